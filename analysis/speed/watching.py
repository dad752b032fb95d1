"""What evidence costs a pass: asked for, as a guard, and where nobody asks.

    python -m analysis.speed.watching [--device cuda] [--tokens 2048 8192 32768] [--rounds 20]

A patch of SmolLM2's shape (random weights, query heads, window 1024, a tenth of the tokens on
full) reads the same text plainly, with its evidence watched, and under a guard, taking turns.
Ratios are of neighbouring passes, with an interval over rounds. Where nobody asks, a fit with
evidence must run the operators of a fit without: they are counted.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.speed.patched_model import build, routed, send
from bayes_router.benchmark.rows import Rows
from bayes_router.diagnostics.measures.bootstrap import clustered
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.routing.guard import Guard
from bayes_router.routing.watch import watching
from bayes_router.timing import device_name, read_call

RESULTS = Path(__file__).parents[1] / "results"
SHAPE, SHARE, FITTED = "smollm2-135m, 30 layers", 0.1, 4096


class Operators(TorchDispatchMode):
    """Counts what is run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one, and count it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def read(router: RoutedPretrained, tokens: Tensor) -> None:
    """The pass that is timed: that of the patched model, as anyone calls it."""
    router.model(input_ids=tokens, use_cache=False)


def operators(router: RoutedPretrained, tokens: Tensor) -> int:
    """How many operators a pass runs, once what it asks only the first time is known."""
    with torch.no_grad():
        read(router, tokens)
        with Operators() as counted:
            read(router, tokens)
    return counted.count


def contenders(router: RoutedPretrained, tokens: Tensor) -> dict[str, Any]:
    """The same pass, by name. The guard's levels are so low that routes stay as they are."""
    plain, evidence = router.policy, router.controller.evidence
    assert evidence is not None
    low = (-1e9,) * len(evidence.layers)
    guard = Guard(tuple(router.cost_ratio.tolist()), 0, low, low, low, evidence.memory)

    def watched() -> None:
        with watching(router.controller) as watch:
            read(router, tokens)
        assert len(watch.log_evidence)

    def guarded() -> None:
        router.policy = guard
        try:
            read(router, tokens)
        finally:
            router.policy = plain

    return {
        "plain": lambda: read(router, tokens),
        "watched": watched,
        "guarded": guarded,
    }


@torch.no_grad()
def measure(rows: Rows, router: RoutedPretrained, length: int, rounds: int) -> None:
    """The rows of one length."""
    device = router.device
    tokens = torch.randint(5, 1000, (1, length), generator=torch.Generator().manual_seed(length))
    calls = contenders(router, tokens.to(device))
    send(router, SHARE, calls["plain"])
    for call in calls.values():
        call()
    times_of = {name: np.empty(rounds) for name in calls}
    for one in range(rounds):
        for name, call in calls.items():
            times_of[name][one] = read_call(call, device).wall_ms
    for name, times in times_of.items():
        ratio = times / times_of["plain"]
        told = clustered(lambda i, r=ratio: float(np.median(r[i])), np.arange(rounds))  # type: ignore[misc]
        row = {
            "tokens": length,
            "pass": name,
            "ms": float(np.median(times)),
            "over plain": told.value,
        }
        rows.add(row | {"low": told.low, "high": told.high, "rounds": rounds})
        print(f"{length:6d}  {name:8s} {row['ms']:9.2f} ms  {told}", flush=True)


def main() -> None:
    """Count, measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32_768])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    router = routed(build(SHAPE, args.layers, device, dtype), "head")
    text = torch.randint(5, 1000, (1, 300), generator=torch.Generator().manual_seed(1)).to(device)
    before = operators(router, text)
    fitted = torch.randint(5, 1000, (FITTED,), generator=torch.Generator().manual_seed(2))
    router.fit_evidence(fitted, context=512, batch_size=1)
    after = operators(router, text)
    print(f"where nobody asks: {after} operators with evidence, {before} without", flush=True)
    assert after == before, "evidence works where nobody asks"
    default = RESULTS / f"watching_{device.type}.csv"
    rows = Rows(
        args.results or default, {"device": device_name(device), "torch": torch.__version__}
    )
    for length in args.tokens:
        measure(rows, router, length, args.rounds)
    rows.finish()


if __name__ == "__main__":
    main()
