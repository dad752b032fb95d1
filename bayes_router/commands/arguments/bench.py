"""The options of measuring."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser
from bayes_router.commands.refused import say
from bayes_router.files import check_folder_for


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `bench`."""
    result = Parser(
        description="Measure routed attention against the fastest full attention of a device, "
        "in turn, planning included: forward, forward and backward, decoding, memory. Nothing is "
        "timed before "
        "every backend agrees with the reference."
    )
    result.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda")
    result.add_argument("--quick", action="store_true", help="short texts and one mix only")
    result.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for speed_DEVICE.csv and .png"
    )
    result.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=None,
        help="tokens T (default: 512 to 32768, 65536 on a GPU)",
    )
    result.add_argument(
        "--mixes",
        type=str,
        nargs="+",
        default=None,
        help="percentages full/linear/local, as 10/60/30",
    )
    result.add_argument(
        "--shapes",
        type=str,
        nargs="+",
        default=None,
        help="BxHxTxDh, as 1x16x32768x64, instead of the usual ones",
    )
    result.add_argument(
        "--seconds",
        type=Optional[float],
        default=None,
        help="time for all (240 on a GPU, 1800 on a CPU); what does not fit is named",
    )
    result.add_argument(
        "--part",
        type=Optional[str],
        default=None,
        help="K/N: what falls to the K-th of N cards, as 2/4; every length is one card's",
    )
    result.add_argument(
        "--cpu_time",
        "--cpu-time",
        action="store_true",
        help="processor time of one thread, on a machine that is shared",
    )
    return result


def begin(options: Namespace) -> None:
    """Refuse what can be refused at once, and print the first line."""
    check_folder_for(options.out)
    options.began = time.perf_counter()  # the import of torch counts
    say(f"bench: to {options.out}; every backend is first held against the reference")
