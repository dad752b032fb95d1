"""The two launches of short texts in the interpreter.

`TRITON_INTERPRET=1 python -m pytest tests/attention/test_short.py`.

On a GPU, compiled: tests/gpu/test_short.py.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
    pytest.skip(
        "runs in the interpreter: TRITON_INTERPRET=1, no CUDA device", allow_module_level=True
    )

from bayes_router.attention.hard import short_launch as short
from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.hard.reference import REFERENCE
from bayes_router.attention.kernels.triton.short import Cut
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import draw, relative_error
from tests.attention.test_dispatch import ROUTES, draw_route


def problem(
    B: int = 2,
    Hkv: int = 2,
    T: int = 150,
    Dh: int = 16,
    route: str = "independent",
    window: int = 21,
    names: tuple[str, ...] = ("full", "linear", "local"),
    shared: bool = False,
    sinks: int = 0,
    seed: int = 0,
    units: int = 1,
) -> RoutedProblem:
    q, k, v = draw(B, 4, Hkv, T, Dh, seed)
    plain_q, plain_k = (q, k) if shared else draw(B, 4, Hkv, T, Dh, seed + 1)[:2]
    experts = resolve_experts(names, ExpertShape(4, Dh, window, sinks))
    return RoutedProblem(
        q, k, v, plain_q, plain_k, draw_route(route, B, T, seed, units) % len(names), experts
    )


def compare(one: RoutedProblem) -> None:
    exact = replace(
        one, **{name: getattr(one, name).double() for name in ("q", "k", "v", "plain_q", "plain_k")}
    )
    assert relative_error(short.launch_short(one), REFERENCE.attend(exact)) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shared", [False, True])
def test_agrees_with_the_oracle(route: str, shared: bool, fresh_seed: int) -> None:
    compare(problem(route=route, shared=shared, seed=fresh_seed))


@pytest.mark.parametrize(("units", "Hkv"), [(2, 2), (4, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("route", ["independent", "units differ"])
def test_every_unit(
    units: int, Hkv: int, route: str, monkeypatch: pytest.MonkeyPatch, fresh_seed: int
) -> None:
    one = problem(Hkv=Hkv, route=route, units=units, seed=fresh_seed, sinks=2)
    compare(one)
    # full attention in segments
    monkeypatch.setattr(short, "cut", lambda *_: Cut(64, 32, 32, 4, 1, 2, None))
    compare(replace(one, lengths=torch.tensor([150, 77])))


@pytest.mark.parametrize(
    ("B", "Hkv", "T", "Dh", "window"), [(1, 4, 1, 16, 1), (3, 1, 64, 20, 1), (1, 2, 65, 8, 200)]
)
def test_odd_sizes(B: int, Hkv: int, T: int, Dh: int, window: int) -> None:
    compare(problem(B, Hkv, T, Dh, window=window))


@pytest.mark.parametrize(
    "names", [("local", "full"), ("linear", "local"), ("linear",), ("local",), ("full",)]
)
def test_fewer_experts(names: tuple[str, ...]) -> None:
    compare(problem(names=names, window=9))


@pytest.mark.parametrize("route", ["independent", "clustered", "local"])
@pytest.mark.parametrize(
    ("window", "sinks"), [(21, 1), (21, 4), (21, 70), (1, 4), (200, 4), (21, 1000)]
)
def test_sinks(route: str, window: int, sinks: int) -> None:
    compare(problem(route=route, window=window, sinks=sinks))
    compare(problem(names=("full", "local"), route=route, window=window, sinks=sinks))


@pytest.mark.parametrize("sinks", [0, 4])
def test_padding_starts_and_experts_elsewhere(sinks: int) -> None:
    whole = problem(B=3, T=140, sinks=sinks)
    compare(replace(whole, lengths=torch.tensor([140, 1, 77])))
    tail = replace(
        whole, q=whole.q[:, :, -40:], plain_q=whole.plain_q[:, :, -40:], route=whole.route[:, -40:]
    )
    compare(tail)
    compare(replace(tail, starts=torch.tensor([0, 100, 33])))
    compare(replace(tail, starts=torch.tensor([0, 100, 33]), lengths=torch.tensor([40, 0, 7])))
    compare(replace(whole, elsewhere=frozenset({1})))


@pytest.mark.parametrize(("segment", "chunk"), [(64, 32), (128, 64), (512, 128)])
@pytest.mark.parametrize("route", ["independent", "clustered", "full"])
def test_however_the_keys_are_cut(
    segment: int, chunk: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short, "cut", lambda *_: Cut(segment, chunk, 32, 4, 1, 2, None))
    compare(problem(B=1, T=300, route=route))


def test_a_state_summed_up_before() -> None:
    compare(problem(B=1, T=130, Dh=128))


def test_layout_of_a_model() -> None:
    """Slices of one projection, [B, T, H + 2 Hkv, Dh] in memory."""
    T, Dh = 100, 16
    heads = torch.randn(2, T, 8, Dh).transpose(1, 2)
    q, k, v = heads.split((4, 2, 2), 1)
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, Dh, 9))
    compare(RoutedProblem(q, k, v, q, k, draw_route("independent", 2, T, units=1), experts))


def test_a_row_of_no_expert_is_zero_and_later_tokens_are_unseen() -> None:
    one = problem(T=130)
    before: Tensor = short.launch_short(one)
    for x in (one.k, one.v, one.plain_k):
        x[:, :, 100:] += 3.0
    after = short.launch_short(one)
    torch.testing.assert_close(before[:, :, :100], after[:, :, :100], rtol=0, atol=0)
