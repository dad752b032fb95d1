"""What the parsers of the commands share."""

from pathlib import Path
from typing import Any, NoReturn, Optional

from jsonargparse import ArgumentParser

from bayes_router.checks import one_line
from bayes_router.wording import plain


class Parser(ArgumentParser):
    """Raises instead of printing the usage: the command line says what is wrong in one line."""

    options: tuple[str, ...] = ()
    """Options that a misspelt one is compared with."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, exit_on_error=False, **kwargs)

    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        """Raise a ValueError of one line."""
        raise ValueError(plain(one_line(ex or Exception(message)), self.options))


def add_run(parser: Parser, what: str = "run folder") -> None:
    """The run folder and the device, which every command on a fitted model takes."""
    parser.add_argument("run", type=Path, help=what)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda")


def add_fitted(parser: Parser) -> None:
    """Options that name what is opened, a run or a patch, and the text it is read on."""
    add_run(parser, "folder of a run or of a patch, or the name of a patch of the package's")
    parser.add_argument(
        "--text",
        type=Optional[Path],
        default=None,
        help="UTF-8 file to show (default: held-out text)",
    )
    parser.add_argument(
        "--corpus",
        type=Optional[str],
        default=None,
        help="corpus whose held-out documents are read",
    )
    parser.add_argument(
        "--base",
        type=Optional[str],
        default=None,
        help="of a patch: the model's folder or Hugging Face name",
    )
    parser.add_argument(
        "--gguf_file",
        "--gguf-file",
        type=Optional[str],
        default=None,
        help="of a patch: GGUF file of the base",
    )
    parser.add_argument(
        "--context", type=Optional[int], default=None, help="of a patch: tokens of a window"
    )
