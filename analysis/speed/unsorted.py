"""Short texts on a GPU: where is it faster to sort nothing?

    python -m analysis.speed.unsorted

10% of the tokens on full, 60% linear and 30% local (of full and local alone 30% and 70%), window
256, at random. For each kind of call
the kernels that sort nothing and those that sort take turns (`short` in two launches, with
gradients `triton`), and the fastest full attention, for the time of a whole pass in a busy stream.
`taken` is what `hard.short.unsorted_pays` says, which holds what this prints. Before a kind is
timed its values and gradients are compared with the float64 reference.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from analysis.speed.units import SHARES, WINDOW, route
from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.hard.reference import REFERENCE
from bayes_router.attention.hard.short import unsorted_pays
from bayes_router.attention.hard.sorted import TRITON
from bayes_router.attention.shapes import ExpertShape
from bayes_router.benchmark.cases import baselines, full_attention
from bayes_router.benchmark.clock import Clock
from bayes_router.benchmark.rows import Rows
from bayes_router.timing import device_name

RESULTS = Path(__file__).parents[1] / "results" / "unsorted_cuda.csv"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}
COMPARED = (2, 4, 300)
SIZES = [(1, 16, 128), (1, 16, 256), (1, 16, 512), (1, 16, 1024)]
MANY = [(8, 4, 256), (8, 16, 256), (16, 16, 256), (2, 16, 512), (4, 16, 512), (2, 16, 1024)]
"""Rows of a batch, heads, tokens."""
INPUTS = ("q", "k", "v", "plain_q", "plain_k")


class Kind(NamedTuple):
    """What a call is like; by default the linear expert reads queries and keys of its own."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    head_size: int = 64
    shared_by: int = 1
    by_head: bool = False
    sinks: int = 0
    one_pair: bool = False
    names: tuple[str, ...] = ("full", "linear", "local")
    shares: tuple[float, ...] = SHARES
    sizes: tuple[tuple[int, int, int], ...] = tuple(SIZES)


KINDS = (
    Kind("the same queries and keys for all", one_pair=True, sizes=(*SIZES, *MANY)),
    Kind("queries and keys by expert", sizes=(*SIZES, *MANY)),
    Kind("routes by head", by_head=True, sizes=(*SIZES, *MANY)),
    Kind("four heads share keys", shared_by=4),
    Kind("4 sinks", sinks=4),
    Kind("full and local", names=("full", "local"), shares=(0.3, 0.7)),
    Kind("heads of 32", head_size=32),
    Kind("heads of 128", head_size=128),
    Kind("float16", dtype=torch.float16),
    Kind("float32", dtype=torch.float32),
)


def draw(kind: Kind, B: int, H: int, T: int, device: torch.device) -> RoutedProblem:
    """A call of this kind whose tensors ask for gradients."""
    generator = torch.Generator().manual_seed(T)

    def one(heads: int) -> Tensor:
        x = torch.randn(B, T, heads, kind.head_size, generator=generator)
        return x.to(device, kind.dtype).transpose(1, 2).requires_grad_()

    HK = H // kind.shared_by
    q, k, v = one(H), one(HK), one(HK)
    plain_q, plain_k = (q, k) if kind.one_pair else (one(H), one(HK))
    experts = resolve_experts(kind.names, ExpertShape(H, kind.head_size, WINDOW, kind.sinks))
    choices = route(B, T, H if kind.by_head else 1, device, kind.shares)
    return RoutedProblem(q, k, v, plain_q, plain_k, choices, experts)


def unsorted(problem: RoutedProblem) -> Tensor:
    """Nothing is sorted."""
    # only where Triton can be imported
    from bayes_router.attention.hard.mixed_launch import launch_mixed

    return launch_mixed(problem)


def sorting(problem: RoutedProblem) -> Tensor:
    """Two launches; with gradients all those of long texts."""
    if problem.needs_grad:
        return TRITON.attend(problem)
    # only where Triton can be imported
    from bayes_router.attention.hard.short_launch import launch_short

    return launch_short(problem)


def leaves(problem: RoutedProblem) -> list[Tensor]:
    """The tensors of a call, each once."""
    return list({id(x): x for x in (getattr(problem, name) for name in INPUTS)}.values())


def error(kind: Kind, device: torch.device) -> float:
    """The largest relative error of values and gradients."""
    problem = draw(kind, *COMPARED, device)
    exact = {id(x): x.detach().double().requires_grad_() for x in leaves(problem)}
    true = replace(problem, **{name: exact[id(getattr(problem, name))] for name in INPUTS})
    got, want = unsorted(problem), REFERENCE.attend(true)
    weight, options = torch.randn_like(want), {"allow_unused": True, "materialize_grads": True}
    found = got.detach(), *torch.autograd.grad(got, leaves(problem), weight.to(got), **options)
    exactly = want.detach(), *torch.autograd.grad(want, leaves(true), weight, **options)
    # what is zero in both, where no expert reads it, has no relative error
    return max(
        float((x.double() - y).norm() / y.norm().clamp(min=1e-9))
        for x, y in zip(found, exactly, strict=True)
    )


def calls(problem: RoutedProblem, gradients: bool) -> dict[str, Callable[[], object]]:
    """Both ways, and full attention where it has a kernel for these tensors."""
    given, inputs = torch.randn_like(problem.q), leaves(problem)

    def whole(call: Callable[[], Tensor]) -> Callable[[], object]:
        if not gradients:
            return torch.no_grad()(call)
        return lambda: torch.autograd.grad(call(), inputs, given, allow_unused=True)

    # a problem remembers whether autograd records it
    found = {
        "unsorted": whole(lambda: unsorted(replace(problem))),
        "sorted": whole(lambda: sorting(replace(problem))),
    }
    if problem.q.dtype != torch.float32 and problem.k.shape == problem.q.shape:
        qkv = problem.q, problem.k, problem.v
        for name, backend in baselines(problem.q.device).items():
            found[name] = whole(partial(full_attention, *qkv, backend))
    return found


def main() -> None:
    """Compare, measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default="cuda")
    every = list(range(len(KINDS)))
    parser.add_argument(
        "--kinds", type=int, nargs="+", choices=every, default=every, help="by their places"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="for each group of calls")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = Rows(args.results, {"device": device_name(args.device), "torch": torch.__version__})
    clock = Clock(args.device, args.seconds)
    for kind in (KINDS[place] for place in args.kinds):
        found = error(kind, args.device)
        if not found < TOLERANCE[kind.dtype]:
            sys.exit(f"{kind.name}: relative error {found:.1e}; nothing is reported")
        for size in kind.sizes:
            problem = draw(kind, *size, args.device)
            for gradients in (False, True):
                times = {name: t.ms for name, t in clock(calls(problem, gradients)).items()}
                ratio = times["unsorted"] / times["sorted"]
                with torch.set_grad_enabled(gradients):
                    taken = unsorted_pays(replace(problem))
                full = min((ms for name, ms in times.items() if "full" in name), default=None)
                facts = dict(zip(("B", "H", "T"), size, strict=True))
                row = {"kind": kind.name, **facts, "gradients": gradients, "taken": taken}
                rows.add(row | {"unsorted": times["unsorted"], "sorted": times["sorted"],
                                "ratio": ratio, "full": full, "error": found})  # fmt: skip
                what = "forward, backward" if gradients else "forward"
                print(
                    f"{kind.name:34s} B{size[0]:<2d} H{size[1]:<2d} T{size[2]:<4d} {what:17s} "
                    f"{times['unsorted']:.4f} ms, sorted {times['sorted']:.4f}: {ratio:.2f}"
                    f"{', taken' if taken else ''}",
                    flush=True,
                )
    table = rows.finish()
    wrong = table.loc[table["taken"] == table["ratio"].gt(1), "ratio"]
    lost = max([1.0, *wrong, *(1 / wrong)])
    print(f"{len(wrong)} of {len(table)} take the slower of both, {lost:.2f} of the time at most")


if __name__ == "__main__":
    main()
