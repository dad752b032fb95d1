"""What a run was fitted on, by its fingerprint: text that promises nothing."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayes_router.data.fingerprint import fingerprint, passage_of, require_unseen
from bayes_router.data.tokens import Batch, TokenDataset, TokenSource
from bayes_router.files import first_line, write_whole

FITTED_TEXT = "fitted_text.safetensors"


def sketch_of(source: TokenSource) -> dict[str, Tensor]:
    """The fingerprint of a run's training text; nothing of a generator, which has no end."""
    if not isinstance(source, TokenDataset):
        return {}
    length = passage_of(source.vocab_size)
    found = fingerprint(source.tokens, length=length)
    return {"hashes": torch.tensor(found, dtype=torch.int64), "length": torch.tensor(length)}


def save_fitted_text(folder: Path, source: TokenSource) -> None:
    """Write the file of a run folder; of a generator one of before goes."""
    kept = sketch_of(source)
    if not kept:
        (folder / FITTED_TEXT).unlink(missing_ok=True)
        return
    write_whole(folder / FITTED_TEXT, lambda path: save_file(kept, path))


def require_unread(folder: Path, own: TokenSource | None, windows: Sequence[Batch]) -> None:
    """Refuse windows that the run in `folder` was fitted on.

    Args:
        folder: of the run.
        own: its training text, for runs of before, which have no file; None: not at hand, and
            such a run is not checked, and a warning says so.
        windows: calibration text.

    Raises:
        ValueError: about how much of the text was read by the fit, or the file is damaged.
    """
    path = folder / FITTED_TEXT
    if own is None and not path.is_file():
        said = f"{path} is missing: whether the fit read the calibration text is not known"
        warnings.warn(f"{said}; a promise holds only if it did not", stacklevel=2)
    try:
        kept = load_file(path) if path.is_file() else {} if own is None else sketch_of(own)
        hashes = kept["hashes"].tolist() if kept else []
    except (KeyError, SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected the fingerprint of the text of a fit; damaged: {first_line(error)}; "
            f"delete it to go without"
        ) from error
    if hashes:
        tokens = torch.cat([row for batch in windows for row in batch.tokens])
        fix = "give another corpus, or leave it out to take what the run held out"
        require_unseen(tokens, hashes, fix, int(kept["length"]))
