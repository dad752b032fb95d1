"""What the parsers of the commands share."""

from pathlib import Path
from typing import Any, NoReturn, Optional

from jsonargparse import ArgumentParser

from bayes_router.checks import one_line


class Parser(ArgumentParser):
    """Raises instead of printing the usage: the command line says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, exit_on_error=False, **kwargs)

    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        """Raise a ValueError of one line."""
        raise ValueError(one_line(ex or Exception(message)))


def add_run(parser: Parser) -> None:
    """The run folder and the device, which every command on a fitted model takes."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda")
