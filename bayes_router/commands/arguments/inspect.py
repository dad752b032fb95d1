"""The options of showing a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

from bayes_router.checks import require
from bayes_router.commands.options import Parser, add_fitted
from bayes_router.commands.refused import check_fitted, say
from bayes_router.config import SURE_ENOUGH
from bayes_router.files import check_file_for


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `inspect`."""
    result = Parser(
        description="Print a text in the terminal, coloured by route, the uncertain tokens marked."
    )
    add_fitted(result)
    result.add_argument(
        "--layer",
        type=Optional[int],
        default=None,
        help="layer whose routes are shown (default: 0)",
    )
    result.add_argument(
        "--unit",
        type=Optional[int],
        default=None,
        help="routing unit of it that is shown: 0 (default), or a key head or query head",
    )
    result.add_argument("--tokens", type=int, default=800, help="tokens to show, at most")
    result.add_argument(
        "--threshold",
        type=Optional[float],
        default=None,
        help=f"a token that is right less probably is marked (default: {SURE_ENOUGH})",
    )
    result.add_argument(
        "--by",
        type=str,
        default="route",
        help="what colours a token: route, risk, foreign, or heads, the share of the layer's units "
        "on its costliest expert",
    )
    result.add_argument(
        "--colour",
        type=str,
        default="auto",
        help="auto, always, never (then letters under the text)",
    )
    result.add_argument(
        "--svg",
        type=Optional[Path],
        default=None,
        help="file to write the coloured text to, as a picture",
    )
    result.add_argument(
        "--table",
        type=Optional[Path],
        default=None,
        help="CSV file to write what is known of each token in each layer: choice, mean and "
        "credible interval of each expert, entropies, cost",
    )
    return result


def begin(options: Namespace) -> None:
    """Refuse what can be refused at once, and print the first line."""
    check_fitted(options)
    if options.by != "route":
        _refuse_unread(options)
    for name in ("svg", "table"):
        if options[name] is not None:
            check_file_for(options[name], name)
    say(f"inspect: {options.run}")


def _refuse_unread(options: Namespace) -> None:
    """Refuse options of one unit's routes beside what is shown of all units, or of all layers."""
    read = {"layer"} if options.by == "heads" else set()
    read |= {"unit"} if options.table is not None else set()
    for name in ("layer", "unit", "threshold"):
        unread = options[name] is not None and name not in read
        require(not unread, name, f"none beside --by {options.by}", options[name], "leave it out")
