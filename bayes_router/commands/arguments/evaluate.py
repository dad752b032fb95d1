"""The options of reading a run on held-out text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser, add_run
from bayes_router.commands.refused import check_folder, say
from bayes_router.config import SURE_ENOUGH
from bayes_router.files import CONFIG, require_file


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `evaluate`."""
    result = Parser(description="Read a fitted run on held-out text, its routes executed.")
    add_run(result)
    result.add_argument(
        "--corpus", type=Optional[str], default=None, help="another corpus than the run's"
    )
    result.add_argument(
        "--tokens", type=Optional[int], default=None, help="read at most this many tokens"
    )
    result.add_argument(
        "--policy",
        type=str,
        default="argmax",
        help="of hard routes: argmax, conservative or another registered",
    )
    result.add_argument(
        "--threshold",
        type=Optional[float],
        default=None,
        help=(
            f"conservative: tokens less sure than this which weight is the largest take a "
            f"stronger expert ({SURE_ENOUGH})"
        ),
    )
    result.add_argument(
        "--budget",
        type=Optional[float],
        default=None,
        help=(
            "attention cost to spend, full = 1: the price is set so that executed routes meet "
            "it within 0.005"
        ),
    )
    result.add_argument(
        "--quality",
        type=Optional[float],
        default=None,
        help=(
            "share of perplexity over the best single expert that may be lost: the cheapest "
            "policy that keeps to it"
        ),
    )
    _add_freezing(result)
    result.add_argument(
        "--confidence",
        type=Optional[float],
        default=None,
        help="with which --quality is kept on text of this kind (default: 0.95)",
    )
    result.add_argument(
        "--cost",
        type=str,
        default="paper",
        help=(
            "unit of the budget: paper, flops, latency, or bytes, the keys and values that a "
            "decoding step at the run's context reads"
        ),
    )
    result.add_argument(
        "--curve_tokens",
        "--curve-tokens",
        type=int,
        default=16_384,
        help="tokens of each pass of the table of nll against budget",
    )
    result.add_argument(
        "--out", type=Optional[Path], default=None, help="folder for evaluation.json and dial.csv"
    )
    return result


def _add_freezing(result: Parser) -> None:
    """Which units are made static, by one of two rules."""
    result.add_argument(
        "--freeze",
        type=Optional[float],
        default=None,
        help=(
            "share of tokens: make units static that send all but so many to one expert; what that "
            "costs, and the bytes of the cache"
        ),
    )
    result.add_argument(
        "--free",
        type=Optional[float],
        default=None,
        help=(
            "in place of --freeze, share of the cache: make key heads static that look far least, "
            "as many as free it"
        ),
    )


def begin(options: Namespace) -> None:
    """Refuse what can be refused at once, and print the first line."""
    require_file(options.run, CONFIG)
    check_folder(options)
    say(f"evaluate: {options.run}")
