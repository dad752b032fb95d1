"""The options of the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser, add_fitted
from bayes_router.commands.refused import check_fitted, say
from bayes_router.files import CONFIG, check_file_for, require_file
from bayes_router.integrations.patch.shipped import SHIPPED, folder_of


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `report`."""
    result = Parser(
        description="Write one self-contained HTML file that shows the posterior of a run, or of "
        "two side by side."
    )
    add_fitted(result)
    result.add_argument(
        "other", type=Optional[Path], nargs="?", default=None, help="second run folder, beside it"
    )
    result.add_argument(
        "--out",
        type=Optional[Path],
        default=None,
        help="file to write (default: RUN/report.html; NAME.html for a patch of the package's)",
    )
    result.add_argument(
        "--tokens", type=int, default=4000, help="tokens of the text to show, at most"
    )
    result.add_argument(
        "--quick", action="store_true", help="leave out guide, calibration and other text (minutes)"
    )
    return result


def begin(options: Namespace) -> None:
    """Refuse what can be refused at once, and print the first line."""
    check_fitted(options)
    shipped = options.run.parent == SHIPPED  # nothing is written into the package
    own = Path(f"{options.run.name}.html") if shipped else options.run / "report.html"
    if options.other is not None:
        options.other = folder_of(options.other)
        if not options.other.is_dir():
            require_file(options.other, CONFIG)
        if options.out is None:
            raise ValueError("out: expected a file for two runs; got none; give --out both.html")
    out = options.out = options.out or own
    check_file_for(out)
    beside = "" if options.other is None else f" beside {options.other}"
    say(f"report: {options.run}{beside}, to {out}")
