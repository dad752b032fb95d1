"""No speed-up before the results are right.

Every backend against the float64 reference on the device that is timed.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.hard.auto import AUTO
from bayes_router.attention.hard.backend import Backend, backends
from bayes_router.attention.hard.dense import DENSE
from bayes_router.attention.hard.dispatch import EXPERTS, routed_attention
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.hard.reference import REFERENCE
from bayes_router.attention.shapes import ExpertShape, with_units
from bayes_router.benchmark.cases import WINDOW, Shape, draw_inputs
from bayes_router.checks import require
from bayes_router.config import ModelConfig

LONG = 4500  # tokens: rows on full are split over their keys, and joined
ROWS = 96  # queries of a stretch that is compared, where comparing all would take minutes
STEPS = 3  # tokens decoded


class Case(NamedTuple):
    """One call that is compared.

    Attributes:
        shape: of the queries.
        kv_heads: of keys and values.
        run: tokens that take the same expert together; 0: all take `expert`.
        grad: compare gradients too.
        lengths: real tokens of each row.
        expert: index of the only expert.
        work: of a CPU, over that of the shortest.
    """

    shape: Shape
    kv_heads: int
    run: int = 1
    grad: bool = True
    lengths: tuple[int, ...] | None = None
    expert: int = 0
    work: float = 1.0


CASES = (
    Case(Shape(2, 4, 777, 64), 4, work=3),
    Case(Shape(1, 4, 777, 64), 2, run=50, work=2.5),
    Case(Shape(3, 4, 900, 64), 2, grad=False, lengths=(900, 1, 333), work=1.5),
    Case(Shape(1, 4, LONG, 64), 2, work=7.5),
    Case(Shape(1, 2, LONG, 128), 1, run=50, grad=False, work=3),
)
CACHE_WORK = 4.0


def verify(
    device: torch.device, experts: Sequence[str] = EXPERTS, until: float | None = None
) -> list[Backend]:
    """The backends that compute something here, each compared in values and gradients.

    Decoding from a cache in values.

    Mixed routes and every token on one expert; short, long enough to be split over keys, padded;
    heads that share keys, two head sizes. `experts` are registered names.

    Raises:
        ValueError: one disagrees; no speed-up may be reported then. Or the
            comparisons would not all end before `until`, by `time.perf_counter`; on a CPU the first
            of them tells.
    """
    alone = [
        Case(Shape(1, 2, LONG, 64), 1, run=0, grad=False, expert=i) for i in range(len(experts))
    ]
    compared: dict[str, Backend] = {}
    began, done = time.perf_counter(), 0.0
    total = sum(case.work for case in (*CASES, *alone)) + CACHE_WORK
    for case in (*CASES, *alone):
        _in_time(until, began, done / total if device.type == "cpu" else 0.0)
        compared |= {
            backend.name: backend
            for backend in _verify(case, _built(experts, case.shape, device), device)
        }
        done += case.work
    _in_time(until, began, done / total if device.type == "cpu" else 0.0)
    batch = max(3, len(experts))
    _verify_cache(
        Case(Shape(batch, 4, LONG, 64), 2, grad=False),
        _built(experts, Shape(batch, 4, LONG, 64), device),
        device,
    )
    return list(compared.values())


def _in_time(until: float | None, began: float, done: float) -> None:
    """ValueError where all that was begun will not end in time, `done` of it being done."""
    now = time.perf_counter()
    whole = (now - began) / done if done else 0.0
    require(
        until is None or max(now, began + whole) <= until,
        "seconds",
        "time to hold every backend against the reference first"
        + (f", {whole:.0f} s at the pace of this machine" if done else ""),
        "less",
        "give more",
    )


def verify_model(device: torch.device, model: ModelConfig) -> None:
    """`verify` with the experts of a model, then long texts and decoding.

    At its own heads, head size and window.

    Raises:
        ValueError: as `verify`.
    """
    verify(device, model.experts)
    case = Case(Shape(1, model.num_heads, LONG, model.head_dim), model.kv_heads, grad=False)
    experts = _built(model.experts, case.shape, device, model.window)
    _verify(case, experts, device)
    _verify_cache(case, experts, device)


def _built(
    experts: Sequence[str], shape: Shape, device: torch.device, window: int = WINDOW
) -> list[Expert]:
    return [
        expert_class(name)(ExpertShape(shape.H, shape.Dh, window)).to(device) for name in experts
    ]


def _draw(case: Case, device: torch.device, experts: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v as slices of one projection, and the route."""
    B, T, run = case.shape.B, case.shape.T, case.run
    q, k, v = draw_inputs(case.shape, device)
    inputs = [
        x.detach().requires_grad_(case.grad)
        for x in (q, k[:, : case.kv_heads], v[:, : case.kv_heads])
    ]
    route = (
        torch.randint(experts, (B, -(-T // (run or T)))) if run else torch.full((B, 1), case.expert)
    )
    return inputs, route.repeat_interleave(run or T, 1)[:, :T].to(device)


def _verify(case: Case, experts: list[Expert], device: torch.device) -> list[Backend]:
    """The backends that do not refuse this case, each found right."""
    inputs, route = _draw(case, device, len(experts))
    q, k, v = inputs
    exact = [x.detach().double().requires_grad_(case.grad) for x in inputs]
    T, window = case.shape.T, experts[0].shape.window
    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=device)
    stretches = [(0, T)] if T < LONG else [(a, a + ROWS) for a in (0, T // 2, T - ROWS)]

    def compared(out: Tensor) -> Tensor:
        return torch.cat([out[:, :, a:b] for a, b in stretches], 2)

    def call(backend: Backend, taken: Tensor | int) -> Tensor:
        return routed_attention(
            q, k, v, taken, window=window, backend=backend, experts=experts, lengths=lengths
        )

    want = _reference(exact, route, experts, lengths, stretches)
    weight = torch.randn_like(want)
    true = torch.autograd.grad((want * weight).sum(), exact) if case.grad else ()
    problem = RoutedProblem(q, k, v, q, k, with_units(route), tuple(experts), lengths)
    found_right = []
    for backend in backends():
        # what all are compared with, and what is one of the others
        if backend in (REFERENCE, AUTO):
            continue
        with torch.no_grad():
            if backend.refuses(replace(problem)):
                continue
            _compare(backend.name, device, "out", compared(call(backend, route)), want)
        found_right.append(backend)
        # whose gradients are those of the experts' own passes
        lean = T < LONG or backend is not DENSE
        if case.grad and lean and not backend.refuses(replace(problem)):
            out = compared(call(backend, route))
            _compare(backend.name, device, "out", out, want)
            found = torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)
            for name, got, right in zip(("dq", "dk", "dv"), found, true, strict=True):
                _compare(backend.name, device, name, got, right)
    if not case.run:  # an int is a route, too
        _compare(
            f"{experts[case.expert].name} alone",
            device,
            "out",
            compared(call(AUTO, case.expert)),
            want,
        )
    return found_right


def _reference(
    exact: Sequence[Tensor],
    route: Tensor,
    experts: list[Expert],
    lengths: Tensor | None,
    stretches: list[tuple[int, int]],
) -> Tensor:
    """Queries of each stretch over the keys up to its end.

    `lengths` where one stretch is all there is.
    """
    q, k, v = exact
    parts = [
        routed_attention(
            q[:, :, a:b],
            k[:, :, :b],
            v[:, :, :b],
            route[:, a:b],
            window=experts[0].shape.window,
            backend=REFERENCE,
            experts=experts,
            lengths=lengths,
        )
        for a, b in stretches
    ]
    return torch.cat(parts, 2)


@torch.no_grad()
def _verify_cache(case: Case, experts: list[Expert], device: torch.device) -> None:
    """The last tokens one at a time after all others, every row on another expert at each."""
    (q, k, v), route = _draw(case, device, len(experts))
    B, T = route.shape
    turn = torch.arange(STEPS) + torch.arange(B)[:, None]
    route[:, -STEPS:] = (turn % len(experts)).to(device)
    cache = LayerCache(experts, B, T, case.kv_heads, device=device, dtype=q.dtype)
    bounds = [0, *range(T - STEPS, T + 1)]
    parts = [
        cache.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], route[:, a:b])
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    want = _reference([q.double(), k.double(), v.double()], route, experts, None, [(T - STEPS, T)])
    _compare("the cache", device, "out", torch.cat(parts[1:], 2), want)


def _compare(who: str, device: torch.device, what: str, got: Tensor, want: Tensor) -> None:
    limit = 2e-2 if device.type == "cuda" else 1e-4
    error = float((got.detach().double() - want.detach()).norm() / want.detach().norm())
    if not error < limit:
        raise ValueError(
            f"bench: expected results within {limit:g} of the float64 reference; {who} on "
            f"{device}: {what} is off by "
            f"{error:.1e}; no speed-up is reported; `python -m pytest tests/attention tests/gpu` "
            f"shows where"
        )
