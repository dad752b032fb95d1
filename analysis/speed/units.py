"""Does the unit of routing cost time: a layer's choice for all heads, or each head's own?

    python -m analysis.speed.units --device cuda

10% of the tokens on full, 60% linear and 30% local, window 256, at random: one choice a token, and
the same shares drawn for each key head and each query head. Full attention is read twice, by cuDNN
and by FlashAttention-2 as torch has it (on a CPU by torch's own kernel). Calls take turns; medians
in a busy stream, and beside a speed-up the least and the most of a turn. Before anything is timed
each unit is compared with the float64 reference.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.benchmark.rows import Rows
from bayes_router.timing import device_name, read_call

RESULTS = Path(__file__).parents[1] / "results" / "units_{}.csv"
WINDOW, SHARES = 256, (0.1, 0.6, 0.3)
PROBLEMS = [  # texts, heads, key heads, head size, keys, gradients
    (1, 16, 16, 64, 32_768, False),
    (1, 16, 4, 64, 32_768, False),
    (1, 16, 16, 128, 32_768, False),
    (2, 8, 8, 64, 8192, False),
    (1, 16, 16, 64, 32_768, True),
]
TOLERANCE = 2e-2


def inputs(
    B: int, H: int, HK: int, D: int, T: int, gradients: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, bfloat16 on a GPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(B, heads, T, D, generator=generator, device=device)
        .to(dtype)
        .requires_grad_(gradients)
        for heads in (H, HK, HK)
    )
    return q, k, v


def route(
    B: int, T: int, units: int, device: torch.device, shares: tuple[float, ...] = SHARES
) -> Tensor:
    """Choices [B, T, units] of these shares."""
    weights, generator = torch.tensor(shares), torch.Generator().manual_seed(units)
    drawn = torch.multinomial(weights, B * T * units, replacement=True, generator=generator)
    return drawn.view(B, T, units).to(device)


def full(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
    """Full attention by one of torch's kernels, or its own choice."""

    def call() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    if backend is None:
        return call()
    with sdpa_kernel([backend]):
        return call()


def trained(forward: Callable[[], Tensor], xs: tuple[Tensor, ...]) -> None:
    """Forward and backward."""
    out = forward()
    torch.autograd.grad(out, xs, torch.ones_like(out))


def disagreements(device: torch.device) -> list[str]:
    """Units whose output differs from the reference."""
    wrong = []
    q, k, v = inputs(1, 8, 4, 64, 700, False, device)
    for units in (1, 4, 8):
        choices = route(1, 700, units, device)
        found, expected = (
            routed_attention(q, k, v, choices, window=WINDOW, backend=backend)
            for backend in ("triton" if device.type == "cuda" else "auto", "reference")
        )
        error = float((found - expected).abs().max())
        print(f"check: {units} units, error {error:.1e}", flush=True)
        if not error < TOLERANCE:
            wrong.append(f"{units} units: {error:.1e}")
    return wrong


Problem = tuple[int, int, int, int, int, bool]


def measure(problem: Problem, rows: Rows, turns: int, device: torch.device) -> None:
    """The rows of one problem."""
    B, H, HK, D, T, gradients = problem
    xs = q, k, v = inputs(*problem, device)
    rivals: dict[str, SDPBackend | None] = {"full": None}
    if device.type == "cuda":
        rivals = {"full, cuDNN": SDPBackend.CUDNN_ATTENTION}
        rivals["full, FlashAttention-2"] = SDPBackend.FLASH_ATTENTION
    forwards: dict[str, Callable[[], Tensor]]
    forwards = {name: partial(full, q, k, v, backend) for name, backend in rivals.items()}
    for name, units in (("layer", 1), ("kv_head", HK), ("head", H)):
        if name != "kv_head" or 1 < HK < H:
            choices = route(B, T, units, device)
            forwards[name] = partial(routed_attention, q, k, v, choices, window=WINDOW)
    calls = {
        name: partial(trained, forward, xs) if gradients else forward
        for name, forward in forwards.items()
    }
    for call in calls.values():
        for _ in range(2):
            call()
    read = [
        {name: read_call(call, device).ms for name, call in calls.items()} for _ in range(turns)
    ]
    for name in calls:
        row: dict[str, object] = {
            "texts": B,
            "heads": H,
            "key_heads": HK,
            "head_dim": D,
            "context": T,
        }
        row |= {"pass": "forward and backward" if gradients else "forward", "unit": name}
        row["ms"] = statistics.median(turn[name] for turn in read)
        for rival in rivals:
            faster = [turn[rival] / turn[name] for turn in read]
            of = f"speed-up over {rival.removeprefix('full, ')}"
            row |= {of: statistics.median(faster), f"{of}, least": min(faster)}
            row[f"{of}, most"] = max(faster)
        row["over layer"] = statistics.median(turn[name] / turn["layer"] for turn in read)
        rows.add(row)
        print("  ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()))


def main() -> None:
    """Check, measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--keys", type=int, default=0, help="in place of each problem's own")
    every = list(range(len(PROBLEMS)))
    parser.add_argument(
        "--problems", type=int, nargs="+", choices=every, default=every, help="by their places"
    )
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    with torch.no_grad():
        wrong = disagreements(args.device)
    if wrong:
        sys.exit("nothing is reported, these differ: " + "; ".join(wrong))
    kind = args.device.type
    facts = {"device": device_name(args.device), "torch": torch.__version__}
    rows = Rows(args.results or Path(str(RESULTS).format(kind)), facts)
    for problem in (PROBLEMS[place] for place in args.problems):
        keys = args.keys or problem[4]
        measure((*problem[:4], keys, problem[5]), rows, args.turns, args.device)
    rows.finish()


if __name__ == "__main__":
    main()
