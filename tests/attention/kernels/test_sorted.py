"""The routed kernels in Triton's interpreter (`make kernels`).

Rows split over keys, batches, padding, what launches get.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
    pytest.skip(
        "runs in the interpreter: TRITON_INTERPRET=1, no CUDA device", allow_module_level=True
    )

from bayes_router.attention.hard import short_launch as short
from bayes_router.attention.hard import sorted_launch as backend
from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.hard.reference import REFERENCE
from bayes_router.attention.kernels.triton import plan
from bayes_router.attention.kernels.triton.launch import launch
from bayes_router.attention.kernels.triton.plan import WorkList
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import draw, relative_error
from tests.attention.test_dispatch import draw_route

NAMES = ("q", "k", "v", "plain_q", "plain_k")


def problem(
    B: int,
    Hkv: int,
    T: int,
    route: str,
    seed: int = 0,
    gradients: bool = True,
    units: int = 1,
    H: int = 2,
) -> RoutedProblem:
    inputs = (*draw(B, H, Hkv, T, seed=seed), *draw(B, H, Hkv, T, seed=seed + 1)[:2])
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(H, 16, 21))
    return RoutedProblem(
        *(x.requires_grad_(gradients) for x in inputs),
        draw_route(route, B, T, seed, units),
        experts,
    )


def compare(one: RoutedProblem) -> None:
    exact = replace(
        one, **{name: getattr(one, name).detach().double().requires_grad_() for name in NAMES}
    )
    got, want = backend.launch_sorted(one), REFERENCE.attend(exact)
    assert relative_error(got, want) < 1e-5
    if not one.needs_grad:
        return
    weight, leaves = (
        torch.randn(got.shape),
        [[getattr(x, name) for name in NAMES] for x in (one, exact)],
    )
    grads = torch.autograd.grad(
        (got * weight).sum(), leaves[0], allow_unused=True, materialize_grads=True
    )
    truths = torch.autograd.grad(
        (want * weight.double()).sum(), leaves[1], allow_unused=True, materialize_grads=True
    )
    for name, g, t in zip(NAMES, grads, truths, strict=True):
        assert relative_error(g, t) < 2e-5, name


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[WorkList]:
    """Work items of 128 keys, the fewest that there can be; the work lists made of them."""
    monkeypatch.setattr(plan, "MIN_KEYS", 1)
    made, make = [], backend.make_work

    def remember(*args: Any) -> WorkList:
        made.append(make(*args[:-1], 400))
        return made[-1]

    monkeypatch.setattr(backend, "make_work", remember)
    return made


@pytest.mark.parametrize(
    ("B", "Hkv", "route"), [(2, 1, "independent"), (1, 2, "full"), (3, 2, "rows differ")]
)
def test_rows_split_over_keys(
    B: int, Hkv: int, route: str, split: list[WorkList], fresh_seed: int
) -> None:
    one = problem(B, Hkv, 290, route, fresh_seed)
    compare(one)
    blocks = -(-int((one.route[0] == 0).sum()) // 32)
    assert split[0].parts[0, :blocks, 0].max() > 1
    compare(replace(one, lengths=torch.tensor([290, 1, 170][:B])))


def test_a_second_backward_pass_takes_every_item_again(
    split: list[WorkList], fresh_seed: int
) -> None:
    one = problem(1, 2, 290, "full", fresh_seed)
    got = backend.launch_sorted(one)
    first, second = (
        torch.autograd.grad(got.sum(), (one.q, one.k, one.v), retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_split_rows_that_start_anywhere(split: list[WorkList], fresh_seed: int) -> None:
    whole = problem(2, 1, 290, "independent", fresh_seed, gradients=False)
    tail = {name: getattr(whole, name)[:, :, -40:] for name in ("q", "plain_q")}
    compare(replace(whole, **tail, route=whole.route[:, -40:]))
    compare(
        replace(
            whole,
            **tail,
            route=whole.route[:, -40:],
            starts=torch.tensor([0, 200]),
            lengths=torch.tensor([40, 33]),
        )
    )
    assert split[0].parts[0, 0, 0] > 1


@pytest.mark.parametrize("above", [40.0, 400.0])
def test_keys_far_above_those_of_the_first_tile(above: float) -> None:
    """Softmax by the maxima of the first tile: weights of 2^58, and some beyond float32."""
    one = problem(1, 2, 290, "full", gradients=False)
    q, k = torch.zeros_like(one.q), torch.zeros_like(one.k)
    q[..., 0], k[:, :, 64::3, 0] = 4.0, above
    compare(replace(one, q=q, k=k, plain_q=q, plain_k=k))


@pytest.mark.parametrize(
    ("B", "Hkv", "T", "route"),
    [(3, 1, 100, "independent"), (2, 2, 65, "clustered"), (2, 1, 1, "linear")],
)
def test_batches_and_padding(B: int, Hkv: int, T: int, route: str, fresh_seed: int) -> None:
    one = problem(B, Hkv, T, route, fresh_seed)
    compare(one)
    compare(replace(one, lengths=torch.tensor([T // 2, T, 0][:B])))


@pytest.mark.parametrize(("units", "Hkv"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("route", ["independent", "units differ"])
def test_every_unit(units: int, Hkv: int, route: str, fresh_seed: int) -> None:
    one = problem(2, Hkv, 100, route, fresh_seed, units=units, H=4)
    compare(one)
    compare(replace(one, lengths=torch.tensor([50, 100])))
    # any strides
    compare(replace(one, route=one.route.transpose(1, 2).contiguous().transpose(1, 2)))
    parts = {name: getattr(one, name).detach()[:, :, -30:] for name in ("q", "plain_q")}
    keys = {name: getattr(one, name).detach() for name in ("k", "v", "plain_k")}
    compare(replace(one, **parts, **keys, route=one.route[:, -30:], starts=torch.tensor([0, 70])))


@pytest.mark.parametrize("units", [1, 3])
def test_tables_of_a_text_of_many_blocks(
    units: int, monkeypatch: pytest.MonkeyPatch, fresh_seed: int
) -> None:
    monkeypatch.setattr(plan, "PLAN_BLOCK", 64)
    route = draw_route("independent", 2, 300, fresh_seed, units)
    order, before = plan.make_plan(route, (0, 1, 2), 3, None)
    for u, choices in enumerate(route.transpose(1, 2).flatten(0, 1)):
        for kind in range(3):
            tokens = (choices == kind).nonzero()[:, 0]
            assert order[u, kind, : len(tokens)].tolist() == tokens.tolist()
            counts = [int((tokens < 64 * step).sum()) for step in range(5)]
            assert before[u, kind].tolist() == [*counts, len(tokens)]


@pytest.mark.parametrize(("units", "Hkv"), [(2, 2), (4, 2)])
def test_units_split_over_keys(
    units: int, Hkv: int, split: list[WorkList], fresh_seed: int
) -> None:
    one = problem(1, Hkv, 290, "independent", fresh_seed, units=units, H=4)
    compare(one)
    for parts, route in zip(split[0].parts, one.route[0].unbind(1), strict=True):
        assert parts[: -(-int((route == 0).sum()) // 32), 0].max() > 1


@pytest.mark.parametrize(("Hkv", "units"), [(1, 2), (2, 1)])
def test_one_tensor_for_both_kinds_of_queries_and_of_keys(
    Hkv: int, units: int, fresh_seed: int
) -> None:
    one = problem(1, Hkv, 140, "independent", fresh_seed, units=units)
    one = replace(one, plain_q=one.q, plain_k=one.k)
    given = one.q, one.k, one.v
    q, k, v = (x.detach().double().requires_grad_() for x in given)
    got = backend.launch_sorted(one)
    want = REFERENCE.attend(replace(one, q=q, k=k, v=v, plain_q=q, plain_k=k))
    weight = torch.randn(got.shape)
    grads = torch.autograd.grad((got * weight).sum(), given)
    truths = torch.autograd.grad((want * weight.double()).sum(), (q, k, v))
    for g, t in zip(grads, truths, strict=True):
        assert relative_error(g, t) < 2e-5
    assert got.transpose(1, 2).is_contiguous()  # heads are joined without a copy


Watcher = Callable[[Callable[..., None]], None]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watcher:
    """Calls a function with the arguments of every launch before it."""

    def install(before: Callable[..., None]) -> None:
        def watched(*args: Any, **constants: Any) -> None:
            before(*args, **constants)
            launch(*args, **constants)

        for name, module in list(sys.modules.items()):
            if (
                name.startswith("bayes_router.attention.")
                and getattr(module, "launch", None) is launch
            ):
                monkeypatch.setattr(module, "launch", watched)

    return install


def test_nothing_that_triton_compiles_for_depends_on_the_route(watch: Watcher) -> None:
    """Kernels, grids, numbers, constants, and dtypes and shapes of tensors.

    All that a compiled kernel is chosen by.
    """
    told: list[Any] = []
    watch(lambda *args, **constants: told.append((*map(shown, args), *constants.items())))
    seen = []
    for route in ("independent", "clustered", "full", "local"):
        one = problem(2, 1, 100, route)
        short.launch_short(replace(one, **{name: getattr(one, name).detach() for name in NAMES}))
        backend.launch_sorted(one).sum().backward()
        seen.append(list(told))
        told.clear()
    assert len(seen[0]) > 10 and all(other == seen[0] for other in seen)


def shown(x: Any) -> Any:
    return (x.dtype, x.shape) if isinstance(x, Tensor) else x


def test_kernels_run_on_the_device_of_their_tensors(
    watch: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    def check(*args: Any, **constants: Any) -> None:
        launches.append(bool(current))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    watch(check)
    launches: list[bool] = []
    one = problem(1, 2, 40, "independent")
    short.launch_short(replace(one, **{name: getattr(one, name).detach() for name in NAMES}))
    backend.launch_sorted(one).sum().backward()
    assert len(launches) > 10 and all(launches)
