"""The unsorted kernels of short texts in the interpreter (`make kernels`).

On a GPU, compiled: tests/gpu/test_mixed.py.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
    pytest.skip(
        "runs in the interpreter: TRITON_INTERPRET=1, no CUDA device", allow_module_level=True
    )

from bayes_router.attention.hard import mixed_launch
from bayes_router.attention.hard.mixed_launch import launch_mixed
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.hard.reference import REFERENCE
from tests.attention.expert_contract import relative_error
from tests.attention.kernels.test_short import problem as short_problem
from tests.attention.test_dispatch import ROUTES

NAMES = ("q", "k", "v", "plain_q", "plain_k")


@pytest.fixture(autouse=True)
def segments_of_64_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some blocks of queries see one segment of the keys here, and some see several."""
    monkeypatch.setattr(mixed_launch, "segment", lambda num_keys: 64)


def problem(T: int = 90, gradients: bool = True, **changes: Any) -> RoutedProblem:
    """As for the two launches; its queries, keys and values ask for gradients."""
    one = short_problem(T=T, **changes)
    for name in NAMES:
        getattr(one, name).requires_grad_(gradients)
    return one


def compare(one: RoutedProblem) -> None:
    """Values, and gradients where they are asked for, with the float64 reference."""
    exact = {name: getattr(one, name).detach().double().requires_grad_() for name in NAMES}
    if one.plain_q is one.q:
        exact |= {"plain_q": exact["q"], "plain_k": exact["k"]}
    got, want = launch_mixed(one), REFERENCE.attend(replace(one, **exact))
    assert relative_error(got, want) < 1e-5
    if not one.needs_grad:
        return
    weight, mine = torch.randn(got.shape), {name: getattr(one, name) for name in NAMES}
    found, true = (
        torch.autograd.grad(
            (out * weight.to(out.dtype)).sum(), list(leaves.values()), allow_unused=True,
            materialize_grads=True,
        )
        for out, leaves in ((got, mine), (want, exact))
    )  # fmt: skip
    for name, g, t in zip(NAMES, found, true, strict=True):
        assert relative_error(g, t) < 2e-5, name


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shared", [False, True])
def test_agrees_with_the_oracle(route: str, shared: bool, fresh_seed: int) -> None:
    compare(problem(route=route, shared=shared, seed=fresh_seed))


@pytest.mark.parametrize(("units", "Hkv"), [(2, 2), (4, 1), (4, 4)])
def test_every_unit_with_sinks_and_padding(units: int, Hkv: int, fresh_seed: int) -> None:
    one = problem(Hkv=Hkv, route="units differ", units=units, seed=fresh_seed, sinks=2)
    compare(one)
    compare(replace(one, lengths=torch.tensor([90, 37])))


@pytest.mark.parametrize(
    ("B", "Hkv", "T", "Dh", "window"), [(1, 4, 1, 16, 1), (3, 1, 64, 20, 1), (1, 2, 65, 8, 200)]
)
@pytest.mark.parametrize("shared", [False, True])
def test_odd_sizes(B: int, Hkv: int, T: int, Dh: int, window: int, shared: bool) -> None:
    compare(problem(T, B=B, Hkv=Hkv, Dh=Dh, window=window, shared=shared))


@pytest.mark.parametrize(
    "names", [("local", "full"), ("linear", "local"), ("linear",), ("local",), ("full",)]
)
def test_fewer_experts(names: tuple[str, ...]) -> None:
    compare(problem(names=names, window=9))


def test_starts_and_experts_elsewhere() -> None:
    whole = problem(B=3, T=140, sinks=4, gradients=False)
    compare(replace(whole, elsewhere=frozenset({1})))
    tail = replace(
        whole, q=whole.q[:, :, -40:], plain_q=whole.plain_q[:, :, -40:], route=whole.route[:, -40:]
    )
    compare(tail)
    compare(replace(tail, starts=torch.tensor([0, 100, 33])))
    compare(replace(tail, starts=torch.tensor([0, 100, 33]), lengths=torch.tensor([40, 0, 7])))


def test_scores_that_grow_along_the_keys(fresh_seed: int) -> None:
    one = problem(B=1, route="full", seed=fresh_seed, gradients=False)
    growing = 40 * torch.arange(90.0)[:, None] / 90
    compare(replace(one, k=one.k * growing, q=one.q * 3))
