"""Does routed attention on a CPU survive a busy neighbour?

    python -m analysis.speed.neighbour [--keys 512 2048 8192] [--mixes 10/60/30] [--threads 2]

By default 10% of the tokens on full, 60% linear and 30% local, window 256, 8 heads of 64, and full
attention by torch: alone, and beside a process that computes all the time. Routed attention is read
as it is (on as many threads as run undisturbed), with every operator shared between all of torch's
threads whoever disturbs them, with one thread, and with every token on local. Contenders take
turns, each called again and again for a while, of which the mean counts, tries of more threads
included; the load of the machine before a situation is a column, for on a machine that others use
`alone` is not alone.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.hard.dispatch import EXPERTS, routed_attention
from bayes_router.attention.kernels.eager.threads import LOAD
from bayes_router.benchmark.busy import neighbours
from bayes_router.benchmark.cases import mix_shares
from bayes_router.benchmark.rows import Rows
from bayes_router.timing import device_name

RESULTS = Path(__file__).parents[1] / "results" / "neighbour_cpu.csv"
HEADS, HEAD_DIM, WINDOW, LOCAL = 8, 64, 256, EXPERTS.index("local")


def contenders(keys: int, mix: str) -> dict[str, Callable[[], Tensor]]:
    """Of one problem, by name."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, keys, HEAD_DIM, generator=generator) for _ in range(3))
    shares = torch.tensor(mix_shares(mix))
    route = torch.multinomial(shares, keys, replacement=True, generator=generator)
    routed = partial(routed_attention, q, k, v, route[None], window=WINDOW)

    def shared() -> Tensor:
        with mock.patch.object(LOAD, "threads", lambda most: most):
            return routed()

    def one_thread() -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return routed()
        finally:
            torch.set_num_threads(before)

    full = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    return {
        "routed": routed,
        "routed, operators shared": shared,
        "routed, one thread": one_thread,
        "local alone": partial(routed_attention, q, k, v, LOCAL, window=WINDOW),
        "full": full,
    }


def mean_ms(call: Callable[[], object], seconds: float) -> float:
    """Of calls one after another for so long, one at least."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls * 1e3


def measure(rows: Rows, keys: int, mix: str, busy: int, turns: int, seconds: float) -> None:
    """The rows of one problem beside so many busy processes."""
    calls = contenders(keys, mix)
    expected = calls["routed, one thread"]()
    for name in ("routed", "routed, operators shared"):
        error = float((calls[name]() - expected).abs().max())
        if not error < 1e-4:
            sys.exit(f"nothing is reported, {name} differs: {error:.1e}")
    load = os.getloadavg()[0]
    with neighbours(busy):
        read: list[dict[str, float]] = [{} for _ in range(turns)]
        for turn in read:
            for name, call in calls.items():
                turn[name] = mean_ms(call, seconds)
    for name in calls:
        times = sorted(turn[name] for turn in read)
        ratio = statistics.median(turn[name] / turn["full"] for turn in read)
        row = {
            "keys": keys,
            "mix": mix,
            "busy": busy,
            "contender": name,
            "ms": statistics.median(times),
        }
        row |= {"least": times[0], "most": times[-1], "over full": ratio, "load": load}
        rows.add(row)
        print("  ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--mixes", nargs="+", default=["10/60/30"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="a contender is called a turn")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = {"device": device_name(torch.device("cpu")), "torch": torch.__version__}
    rows = Rows(args.results, facts)
    with torch.no_grad():
        for keys, mix, busy in product(args.keys, args.mixes, (0, 1)):
            measure(rows, keys, mix, busy, args.turns, args.seconds)
    rows.finish()


if __name__ == "__main__":
    main()
