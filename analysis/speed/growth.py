"""Do linear and local attention grow linearly?

`python -m analysis.speed.growth` (CPU, one thread; B 1, D 256 as 4 x 64, W 32).

Median processor time and peak memory of a causal pass at T and 2 T, and their ratios; written to
analysis/results/growth.csv.
"""

import argparse
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

from bayes_router.attention.experts.contract import expert_class
from bayes_router.attention.shapes import ExpertShape
from bayes_router.benchmark.memory import peak_bytes
from bayes_router.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "growth.csv"
SHAPE = ExpertShape(num_heads=4, head_dim=64, window=32)


@torch.no_grad()
def milliseconds(name: str, length: int, rounds: int = 9) -> float:
    """Median processor time of a pass."""
    expert = expert_class(name)(SHAPE)
    inputs = torch.randn(3, 1, SHAPE.num_heads, length, SHAPE.head_dim)
    times = []
    for _ in range(rounds + 1):
        started = time.process_time()
        expert(*inputs)
        times.append(1e3 * (time.process_time() - started))
    return statistics.median(times[1:])


def measure(lengths: list[int]) -> pd.DataFrame:
    """One row an expert and length; ratios are to the row before."""
    rows = []
    for name in ("full", "linear", "local"):
        for length in lengths:
            peak = peak_bytes(
                name,
                length,
                SHAPE.num_heads,
                SHAPE.head_dim,
                SHAPE.window,
                training=False,
                device=torch.device("cpu"),
            )
            rows.append(
                {
                    "expert": name,
                    "T": length,
                    "ms": milliseconds(name, length),
                    "peak_mib": peak / 2**20,
                }
            )
    frame = pd.DataFrame(rows)
    before = frame.groupby("expert")[["ms", "peak_mib"]].shift()
    return frame.assign(
        time_ratio=frame["ms"] / before["ms"], memory_ratio=frame["peak_mib"] / before["peak_mib"]
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    frame = measure(args.lengths)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, lambda p: frame.to_csv(p, index=False, float_format="%.4g"))
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.2f}"))


if __name__ == "__main__":
    main()
