"""The options of showing a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

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
    result.add_argument("--layer", type=int, default=0, help="layer whose routes are shown")
    result.add_argument(
        "--unit",
        type=int,
        default=0,
        help="routing unit of it that is shown: 0, or a key head or query head",
    )
    result.add_argument("--tokens", type=int, default=800, help="tokens to show, at most")
    result.add_argument(
        "--threshold",
        type=float,
        default=SURE_ENOUGH,
        help="a token that is right less probably is marked",
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
    for name in ("svg", "table"):
        if options[name] is not None:
            check_file_for(options[name], name)
    say(f"inspect: {options.run}")
