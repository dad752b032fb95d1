"""The Hugging Face hub, for what is saved here: a folder is sent there, or fetched."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from bayes_router.checks import get_extra, one_line
from bayes_router.files import write_text

KEPT = ["*.safetensors", "*.json"]
"""What is fetched of a repository: neither pickles nor code."""
CARD = "README.md"
LIBRARY = "library_name: bayes-router"
"""Stands in the metadata of every card that is written here."""


def write_card(folder: Path, text: str) -> None:
    """Write the card of a folder.

    One that somebody else wrote stays, as a trainer's of the model beside a patch.
    """
    path = folder / CARD
    if not path.exists() or LIBRARY in path.read_text(encoding="utf-8"):
        write_text(path, text)


def push(
    save: Callable[[Path], object], name: str, private: bool = True, token: str | None = None
) -> str:
    """Send what `save` writes into a folder to a repository; its address (`Sent.push_to_hub`)."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(name, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return str(api.upload_folder(repo_id=name, folder_path=folder))


class Sent:
    """What can be sent to the hub: its `save_pretrained` writes a folder."""

    save_pretrained: Callable[..., object]

    def push_to_hub(self, name: str, *, private: bool = True, token: str | None = None) -> str:
        """`save_pretrained` to a repository of the Hugging Face hub, with its card; the address.

        No text is sent.

        Args:
            name: OWNER/REPOSITORY, made if it is not there.
            private: of a repository that is made.
            token: of an account that may write there; by default the one that is logged in.
        """
        return push(self.save_pretrained, name, private, token)


def folder_of(
    folder_or_name: Path | str, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """A folder as it is, which asks nobody, or OWNER/REPOSITORY from the hub or its cache.

    Args:
        folder_or_name: what is no folder and looks like OWNER/REPOSITORY is asked for.
        revision: branch, tag or commit of a repository.
        local_files_only: take what the cache has and ask nobody (also HF_HUB_OFFLINE=1).

    Raises:
        ValueError: there is no such repository.
    """
    folder, name = Path(folder_or_name), str(folder_or_name)
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"folder_or_name: expected a folder, as huggingface_hub is not installed; {name} is "
            f"none; {get_extra('hf')}"
        ) from None
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=KEPT,
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder_or_name: expected a folder, or a repository of the hub; got {name}: "
            f"{one_line(error)}; "
            "give the folder that save_pretrained wrote"
        ) from error
