"""The options of finding a prior."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser
from bayes_router.commands.refused import check_folder, say
from bayes_router.files import CONFIG, require_file
from bayes_router.presets import PRESETS


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `sweep`."""
    result = Parser(
        description=(
            "Print the settings of a prior whose routes cost a target on average, as "
            "TOML for `fit --config`."
        )
    )
    _add_prior(result)
    _add_refits(result)
    return result


def _add_prior(result: Parser) -> None:
    """What is solved for, and what is kept."""
    result.add_argument(
        "run",
        type=Optional[Path],
        nargs="?",
        default=None,
        help="run folder to sweep the prior's settings on",
    )
    result.add_argument(
        "--target_cost",
        "--target-cost",
        type=Optional[float],
        default=None,
        help="mean cost, full = 1",
    )
    result.add_argument(
        "--target_entropy",
        "--target-entropy",
        type=Optional[float],
        default=None,
        help="expected entropy of a route, nats",
    )
    result.add_argument(
        "--preset",
        type=str,
        default="tiny",
        help=f"experts and sizes without a run: {', '.join(PRESETS)}",
    )
    result.add_argument(
        "--cost", type=Optional[str], default=None, help="unit of cost: paper, flops or latency"
    )
    result.add_argument(
        "--context",
        type=Optional[int],
        default=None,
        help="tokens at which flops and latency are counted",
    )
    result.add_argument(
        "--map",
        type=Optional[str],
        default=None,
        help="from cost to mean: boltzmann, inverse, uniform",
    )
    result.add_argument(
        "--total_concentration",
        "--total-concentration",
        type=Optional[float],
        default=None,
        help="kept unless solved for",
    )
    result.add_argument(
        "--price",
        type=Optional[float],
        default=None,
        help="tilt of the solved prior, nats per unit of cost; 0 by default",
    )
    result.add_argument("--samples", type=int, default=20_000, help="draws that check the solution")


def _add_refits(result: Parser) -> None:
    """What is written, and how a run is fitted anew for each setting."""
    result.add_argument(
        "--out",
        type=Optional[Path],
        default=None,
        help="folder for prior.toml, the figures and sweep.csv",
    )
    result.add_argument(
        "--steps", type=int, default=100, help="of each refit of the sweep; 0 for no sweep"
    )
    result.add_argument("--seeds", type=int, default=1, help="refits of each setting")
    result.add_argument(
        "--refit",
        type=str,
        default="controllers",
        help="weights that a refit moves: controllers or everything",
    )
    result.add_argument(
        "--tokens", type=int, default=16_384, help="held-out tokens that each refit is read on"
    )
    result.add_argument("--device", type=str, default="auto", help="of the sweep: auto, cpu, cuda")


def begin(options: Namespace) -> None:
    """As a comment of TOML: all that the command prints is a file that `fit --config` reads."""
    if options.run is not None:
        require_file(options.run, CONFIG)
    check_folder(options)
    say(f"# sweep: a prior for {options.run or f'the preset {options.preset}'}")
