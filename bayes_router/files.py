"""Files that are whole or absent, and the names of those in a run folder. Read without torch."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows has none: there, nobody finds out that another holds a folder
    fcntl = None  # type: ignore[assignment]

CAN_HOLD = fcntl is not None
"""Whether `held` tells who holds a folder."""

CONFIG, METRICS, SUMMARY, WEIGHTS, STATE = (
    "config.toml",
    "metrics.csv",
    "summary.json",
    "model.safetensors",
    "state.pt",
)
PATCH = "router.json"
"""What tells the folder of a patch."""
PRETRAINED = "config.json"
"""What tells Hugging Face's Auto classes what the weights are."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file beside `path`, then rename it.

    A reader sees the old file or the new, never half of one.

    What is there and no file, such as /dev/stdout or a pipe, is written into.

    Raises:
        OSError: the file cannot be written; the old one is as it was.
    """
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / path.name
            write(whole)
            with open(path, "wb") as stream:
                stream.write(whole.read_bytes())
        return
    path = path.resolve()  # what a link leads to, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            write(temporary)
        # how torch and safetensors report a full disk
        except (RuntimeError, SafetensorError) as error:
            raise OSError(f"{path}: {first_line(error)}") from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which a renamed file would take the place of."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def require_file(run: Path, name: str) -> Path:
    """The path of a file of a run, which must be there."""
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise ValueError(
            f"run: expected a run folder; {run} {what}; make one with `bayes-router fit --out "
            f"{run}`"
        )
    if (run / PATCH).is_file():
        raise ValueError(
            f"run: expected a run folder; {run} holds a patch; inspect and report take one"
        )
    if not (run / name).is_file():
        raise ValueError(
            f"run: expected {name} in {run}; it is missing: not a run folder, or a run that never "
            f"got so far"
        )
    return run / name


def check_folder_for(path: Path, name: str = "out") -> None:
    """Refuse a folder that cannot be made and written to, and leave nothing there.

    Before the hours whose results it is to hold.

    Raises:
        ValueError: `path` is a file, lies below one, or may not be written.
    """
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"{name}: expected a folder; {nearest} is a file; choose another path")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"{name}: expected a folder that can be written; got {path}: {error.strerror}; give "
            f"--{name} elsewhere"
        ) from error


def check_file_for(path: Path, name: str = "out") -> None:
    """Refuse a file that cannot be written, before the hours whose results it is to hold.

    Raises:
        ValueError: `path` is a folder, its folder is not there, or may not be written.
    """
    if path.is_dir():
        raise ValueError(f"{name}: expected a file; {path} is a folder; name a file in it")
    if is_special(path):
        return
    if not path.parent.is_dir():
        raise ValueError(
            f"{name}: expected a file in an existing folder; {path.parent} is none; make it first"
        )
    check_folder_for(path.parent, name)


@contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a folder among processes and threads; whether this one got it.

    A process that is killed lets go by itself.

    Args:
        folder: what is held.
        wait: for as long as another holds it, instead of giving up.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """What went wrong, as one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
