"""Every backend of hard routing that runs on the CPU against the oracle.

Values, gradients, padding, errors.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_router.attention.experts.linear import LinearAttention
from bayes_router.attention.hard import rows
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.hard.problem import resolve_experts
from bayes_router.attention.kernels.eager import rows_linear, rows_softmax
from bayes_router.attention.shapes import ExpertShape
from tests.attention.dense_check import draw_expert
from tests.attention.expert_contract import draw, gradient_errors, relative_error

WINDOW = 9
BACKENDS = ("torch", "dense")


def draw_route(kind: str, B: int, T: int, seed: int = 0, units: int | None = None) -> Tensor:
    """[B, T], or [B, T, R] with another route for each of the units."""
    if units is not None:
        if kind == "units differ":
            return (torch.arange(units) % 3).expand(B, T, units).contiguous()
        drawn = [draw_route(kind, B, T, seed + 101 * r) for r in range(units)]
        if kind == "rows differ":
            drawn = [(one + r) % 3 for r, one in enumerate(drawn)]
        return torch.stack(drawn, 2)
    generator = torch.Generator().manual_seed(seed)
    if kind == "independent":
        return torch.multinomial(
            torch.tensor([0.2, 0.5, 0.3]), B * T, True, generator=generator
        ).view(B, T)
    if kind == "clustered":
        return torch.randint(3, (B, -(-T // 17)), generator=generator).repeat_interleave(17, 1)[
            :, :T
        ]
    if kind == "rows differ":
        return (torch.arange(B) % 3)[:, None].expand(B, T).contiguous()
    return torch.full((B, T), ("full", "linear", "local").index(kind))


ROUTES = ("independent", "clustered", "rows differ", "full", "linear", "local")
# B, Hkv, T, Dh
SHAPES = [(1, 4, 1, 16), (2, 2, 37, 16), (3, 1, 130, 32), (1, 4, 300, 16), (1, 2, 1100, 16)]


@pytest.mark.parametrize(
    ("backend", "kind", "shape"), list(itertools.product(BACKENDS, ROUTES, SHAPES))
)
def test_agrees_with_the_oracle_in_value_and_gradient(
    backend: str, kind: str, shape: tuple[int, int, int, int], seed: int
) -> None:
    B, Hkv, T, Dh = shape
    route = draw_route(kind, B, T, seed)
    inputs = [
        x.requires_grad_()
        for x in (*draw(B, 4, Hkv, T, Dh, seed), *draw(B, 4, Hkv, T, Dh, seed + 1)[:2])
    ]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def run(q: Tensor, k: Tensor, v: Tensor, lq: Tensor, lk: Tensor, backend: str) -> Tensor:
        return routed_attention(
            q, k, v, route, window=WINDOW, linear_q=lq, linear_k=lk, backend=backend
        )

    got, want = run(*inputs, backend=backend), run(*exact, backend="reference")
    assert relative_error(got, want) < 1e-5
    weight = torch.randn(got.shape)
    gradients = torch.autograd.grad((got * weight).sum(), inputs, allow_unused=True)
    truths = torch.autograd.grad((want * weight).sum(), exact, allow_unused=True)
    for name, g, t in zip(("q", "k", "v", "linear_q", "linear_k"), gradients, truths, strict=True):
        assert (
            relative_error(
                torch.zeros(1) if g is None else g, torch.zeros(1).double() if t is None else t
            )
            < 1e-5
        ), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_larger_than_a_block(backend: str) -> None:
    q, k, v = draw(2, 4, 2, 700)
    route = draw_route("independent", 2, 700)
    got = routed_attention(q, k, v, route, window=300, backend=backend)
    want = routed_attention(q, k, v, route, window=300, backend="reference")
    assert relative_error(got, want.double()) < 1e-5


@pytest.mark.parametrize("window", [WINDOW, 60])  # below a block of local queries, and above
def test_chunks_segments_and_far_keys_join(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    for room, name, size in (
        (rows_softmax, "ROWS", 24),
        (rows_softmax, "FAR_ROWS", 60),
        (rows_softmax, "SPAN", 16),
        (rows_softmax, "LOCAL_ROWS", 24),
        (rows_softmax, "KEYS", 50),
        (rows_linear, "CHUNK", 8),
        (rows_linear, "KEPT", 3),
    ):
        monkeypatch.setattr(room, name, size)
    q, k, v = draw(2, 4, 2, 330)
    for kind in ("independent", "clustered", "local"):
        route = draw_route(kind, 2, 330)
        want = routed_attention(q, k, v, route, window=window, backend="reference")
        with torch.no_grad():
            assert (
                relative_error(
                    routed_attention(q, k, v, route, window=window, backend="torch"), want.double()
                )
                < 1e-5
            )
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        got = routed_attention(*inputs, route, window=window, backend="torch")
        truth = torch.autograd.grad(
            routed_attention(*inputs, route, window=window, backend="dense").sum(), inputs
        )
        for g, t in zip(torch.autograd.grad(got.sum(), inputs), truth, strict=True):
            assert relative_error(g, t.double()) < 1e-5


# (window, sinks): sinks fewer and more than the window and than the text; window shorter and longer
# than the text
SINKS = [(WINDOW, 1), (WINDOW, 4), (WINDOW, 30), (WINDOW, 1000), (1, 4), (1000, 4), (150, 200)]


@pytest.mark.parametrize(("window", "sinks"), SINKS)
@pytest.mark.parametrize("kind", ["independent", "clustered", "rows differ", "local"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_agree_with_the_oracle_in_value_and_gradient(
    backend: str, kind: str, window: int, sinks: int
) -> None:
    B, T = 3, 300
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, 16, window, sinks))
    route, lengths = draw_route(kind, B, T), torch.tensor([T, 1, 170])
    inputs = [x.requires_grad_() for x in draw(B, 4, 2, T)]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def run(xs: list[Tensor], backend: str) -> Tensor:
        q, k, v = xs
        return routed_attention(
            q, k, v, route, window=window, backend=backend, lengths=lengths, experts=experts
        )

    got, want = run(inputs, backend), run(exact, "reference")
    assert relative_error(got, want) < 1e-5
    with torch.no_grad():
        assert relative_error(run(inputs, backend), want) < 1e-5
    weight = torch.randn(got.shape)
    gradients = torch.autograd.grad((got * weight).sum(), inputs)
    truths = torch.autograd.grad((want * weight.double()).sum(), exact)
    for name, g, t in zip("qkv", gradients, truths, strict=True):
        assert relative_error(g, t) < 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("units", [1, 2, 4])
@pytest.mark.parametrize(("T", "window", "sinks"), [(500, 256, 0), (300, 170, 7), (40, 20, 3)])
def test_full_and_local_of_a_short_text_are_computed_together(
    T: int, window: int, sinks: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, 16, window, sinks))
    route, lengths = draw_route("independent", 2, T, units=units), torch.tensor([T, T - 9])
    q, k, v = draw(2, 4, 2, T)
    taken, softmax = [], rows_softmax.softmax_rows

    def counted(*args: Any) -> Any:
        taken.append(args[-1])
        return softmax(*args)

    monkeypatch.setattr(rows, "softmax_rows", counted)
    given: dict[str, Any] = {"window": window, "lengths": lengths, "experts": experts}
    got = routed_attention(q, k, v, route, backend="torch", **given)
    exact = (x.double() for x in (q, k, v))
    want = routed_attention(*exact, route, backend="reference", **given)
    assert relative_error(got, want) < 1e-5
    assert len(taken) == 2 * units and all(0 < wide.sum() < len(wide) for wide in taken)


def test_sinks_of_the_oracle_are_its_definition() -> None:
    window, sinks, T = 3, 2, 9
    q, k, v = draw(1, 1, 1, T)
    experts = resolve_experts(("local",), ExpertShape(1, 16, window, sinks))
    out = routed_attention(q, k, v, 0, window=window, backend="reference", experts=experts)
    for t in range(T):
        seen = [n for n in range(t + 1) if t - n < window or n < sinks]
        weight = (q[0, 0, t] @ k[0, 0, seen].T / 4).softmax(-1)
        torch.testing.assert_close(out[0, 0, t], weight @ v[0, 0, seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sinks", [0, 70])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_both_ways_to_compute_a_tile(
    fused: bool, sinks: int, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_softmax, "_fused", lambda x: fused)
    inputs = [x.to(dtype).requires_grad_() for x in draw(2, 4, 2, 300)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    route, lengths = draw_route("independent", 2, 300), torch.tensor([300, 170])
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, 16, WINDOW, sinks))
    got, want = (
        routed_attention(
            *x, route, window=WINDOW, backend=backend, lengths=lengths, experts=experts
        )
        for x, backend in ((inputs, "torch"), (exact, "reference"))
    )
    assert relative_error(got, want) < limit
    weight = torch.randn(got.shape)
    truth = torch.autograd.grad((want * weight.double()).sum(), exact)
    for g, t in zip(
        torch.autograd.grad((got * weight.to(dtype)).sum(), inputs), truth, strict=True
    ):
        assert relative_error(g, t) < 2 * limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in draw(2, 4, 2, 200))
    route = draw_route("independent", 2, 200)
    got = routed_attention(q, k, v, route, window=WINDOW, backend=backend)
    assert got.dtype == dtype
    want = routed_attention(
        q.double(), k.double(), v.double(), route, window=WINDOW, backend="reference"
    )
    assert relative_error(got, want) < 2e-2


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_padding_is_zero_and_unseen(backend: str) -> None:
    q, k, v = draw(3, 4, 2, 90)
    route, lengths = draw_route("independent", 3, 90), torch.tensor([90, 1, 40])
    out = routed_attention(q, k, v, route, window=WINDOW, backend=backend, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = routed_attention(
            *(x[b : b + 1, :, :n] for x in (q, k, v)), route[b : b + 1, :n], window=WINDOW
        )
        torch.testing.assert_close(out[b : b + 1, :, :n], alone, rtol=1e-4, atol=1e-5)
        assert not out[b, :, n:].any()


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_queries_at_starts_equal_the_full_pass(backend: str, sinks: int) -> None:
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, 16, WINDOW, sinks))
    q, k, v = draw(3, 4, 2, 120)
    route = draw_route("independent", 3, 120)
    whole = routed_attention(q, k, v, route, window=WINDOW, experts=experts, backend="reference")
    starts, new = torch.tensor([0, 100, 37]), 20
    rows = starts[:, None] + torch.arange(new)
    picked = torch.stack([q[b, :, rows[b]] for b in range(3)])
    out = routed_attention(
        picked,
        k,
        v,
        route.gather(1, rows),
        window=WINDOW,
        experts=experts,
        backend=backend,
        starts=starts,
    )
    want = torch.stack([whole[b, :, rows[b]] for b in range(3)])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    last = routed_attention(
        q[:, :, -7:], k, v, route[:, -7:], window=WINDOW, experts=experts, backend=backend
    )
    torch.testing.assert_close(last, whole[:, :, -7:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 4, 150])
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_no_future_leak(backend: str, sinks: int) -> None:
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, 16, WINDOW, sinks))
    q, k, v = draw(1, 4, 2, 200)
    route = draw_route("independent", 1, 200)
    before = routed_attention(q, k, v, route, window=WINDOW, experts=experts, backend=backend)
    for x in (q, k, v):
        x[:, :, 100:] += 3.0
    # later routes may change what is gathered with an earlier token
    route[:, 100:] = (route[:, 100:] + 1) % 3
    after = routed_attention(q, k, v, route, window=WINDOW, experts=experts, backend=backend)
    torch.testing.assert_close(before[:, :, :100], after[:, :, :100], rtol=1e-5, atol=1e-6)


class Squared(LinearAttention):
    """A linear expert with its own feature map: it must not be computed with its parent's."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.extend(q, k, v, self.init_state(q, k, v))[0]

    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().extend(q.square(), k.square(), v, state)


class OwnKernel(Squared):
    calls = 0

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        OwnKernel.calls += 1
        return self(q, k, v).masked_fill(~chosen[:, None, :, None], torch.nan)


@pytest.mark.parametrize(
    ("kind", "backend"), list(itertools.product((Squared, OwnKernel), ("torch", "dense", "auto")))
)
def test_custom_experts_compute_their_own_rows(kind: type[Squared], backend: str) -> None:
    q, k, v = draw(2, 4, 2, 100)
    route = draw_route("independent", 2, 100)
    mine = kind(ExpertShape(4, 16, WINDOW))
    out = routed_attention(
        q, k, v, route, window=WINDOW, backend=backend, experts=("full", mine, "local")
    )
    plain = routed_attention(q, k, v, route, window=WINDOW, backend="reference")
    want = torch.where((route == 1)[:, None, :, None], mine(q, k, v), plain)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert kind is Squared or backend == "dense" or OwnKernel.calls


def test_one_int_routes_every_token() -> None:
    q, k, v = draw(2, 4, 2, 50)
    for index in range(3):
        want = routed_attention(
            q, k, v, torch.full((2, 50), index), window=WINDOW, backend="reference"
        )
        torch.testing.assert_close(
            routed_attention(q, k, v, index, window=WINDOW), want, rtol=1e-4, atol=1e-5
        )


def test_no_tokens_and_no_rows() -> None:
    for B, T in ((2, 0), (0, 5)):
        q, k, v = draw(B, 4, 2, T)
        for backend in (*BACKENDS, "auto"):
            assert (
                routed_attention(
                    q, k, v, torch.zeros(B, T, dtype=torch.long), window=3, backend=backend
                ).shape
                == q.shape
            )


UNITS = [(1, 1), (4, 1), (2, 2), (4, 2), (4, 4)]  # R, Hkv of 4 query heads


@pytest.mark.parametrize(("units", "Hkv"), UNITS)
@pytest.mark.parametrize(
    "kind", ["independent", "clustered", "rows differ", "units differ", "local"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_unit_agrees_with_the_oracle_in_value_and_gradient(
    backend: str, kind: str, units: int, Hkv: int, fresh_seed: int
) -> None:
    B, T = 2, 210
    route, lengths = draw_route(kind, B, T, fresh_seed, units), torch.tensor([T, 130])
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, 16, WINDOW, 2))
    inputs = [
        x.requires_grad_()
        for x in (*draw(B, 4, Hkv, T, 16, fresh_seed), *draw(B, 4, Hkv, T, 16, fresh_seed + 1)[:2])
    ]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def run(xs: list[Tensor], backend: str) -> Tensor:
        q, k, v, lq, lk = xs
        named = {"linear_q": lq, "linear_k": lk, "lengths": lengths, "experts": experts}
        return routed_attention(q, k, v, route, window=WINDOW, backend=backend, **named)

    got, want = run(inputs, backend), run(exact, "reference")
    assert relative_error(got, want) < 1e-5
    with torch.no_grad():
        assert relative_error(run(inputs, backend), want) < 1e-5
    weight = torch.randn(got.shape)
    gradients = torch.autograd.grad(
        (got * weight).sum(), inputs, allow_unused=True, materialize_grads=True
    )
    truths = torch.autograd.grad(
        (want * weight.double()).sum(), exact, allow_unused=True, materialize_grads=True
    )
    for name, g, t in zip(("q", "k", "v", "linear_q", "linear_k"), gradients, truths, strict=True):
        assert relative_error(g, t) < 1e-5, name


@pytest.mark.parametrize(("units", "Hkv"), UNITS)
def test_the_oracle_takes_each_head_as_its_unit_says(units: int, Hkv: int) -> None:
    """Against calls of one head each, which know no units."""
    q, k, v = draw(2, 4, Hkv, 90)
    route = draw_route("independent", 2, 90, units=units)
    out = routed_attention(q, k, v, route, window=WINDOW, backend="reference")
    for h in range(4):
        key = slice(h * Hkv // 4, h * Hkv // 4 + 1)
        alone = routed_attention(
            q[:, h : h + 1], k[:, key], v[:, key], route[:, :, h * units // 4], window=WINDOW
        )
        torch.testing.assert_close(out[:, h : h + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_no_unit_sees_the_future(backend: str) -> None:
    q, k, v = draw(1, 4, 2, 200)
    route = draw_route("independent", 1, 200, units=4)
    before = routed_attention(q, k, v, route, window=WINDOW, backend=backend)
    for x in (q, k, v):
        x[:, :, 100:] += 3.0
    route[:, 100:] = (route[:, 100:] + 1) % 3
    after = routed_attention(q, k, v, route, window=WINDOW, backend=backend)
    torch.testing.assert_close(before[:, :, :100], after[:, :, :100], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gated", "mapped"])
@pytest.mark.parametrize("units", [2, 4])
def test_experts_with_heads_of_their_own_compute_each_units_rows(name: str, units: int) -> None:
    mine = draw_expert(name, ExpertShape(4, 16, WINDOW))
    q, k, v = (x.requires_grad_() for x in draw(2, 4, 2, 150))
    route = draw_route("independent", 2, 150, units=units)
    out, want = (
        routed_attention(
            q, k, v, route, window=WINDOW, backend=backend, experts=("full", mine, "local")
        )
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    leaves, weight = (q, k, v, *mine.parameters()), torch.randn(out.shape)
    got, truth = (torch.autograd.grad((x * weight).sum(), leaves) for x in (out, want))
    assert max(gradient_errors(got, truth)) < 1e-4


@pytest.mark.parametrize("units", [3, 8, 0])
def test_units_that_cut_no_heads_are_refused(units: int) -> None:
    q, k, v = draw(1, 4, 2, 5)
    with pytest.raises(ValueError, match="route: expected"):
        routed_attention(q, k, v, torch.zeros(1, 5, units, dtype=torch.int64), window=3)
