"""Any shape, route, window and dtype.

Dispatch, experts and cache against the oracle and against themselves.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import expert_class
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.shapes import ExpertShape

NAMES = ("full", "linear", "local", "gated", "mapped")
# linear sums are in float32 at most
DTYPES = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 6e-2}
quick = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def problems(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
    most_sinks: int = 50,
) -> dict[str, object]:
    B, T, Hkv, group = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    Dh, seed = 2 * draw(st.integers(1, 8)), draw(st.integers(0, 10_000))
    names = tuple(draw(st.permutations(NAMES)))[: draw(st.integers(1, 4))]
    window = draw(st.one_of(st.integers(1, 10), st.integers(30, 100)))
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from(["random", "all on one", "clustered"]))
    generator = torch.Generator().manual_seed(seed)
    if kind == "all on one":
        route = torch.full((B, T), draw(st.integers(0, len(names) - 1)))
    else:
        route = torch.randint(len(names), (B, T), generator=generator)
        route = route[:, :1].expand(B, T).contiguous() if kind == "clustered" else route
    q, lq = (torch.randn(B, Hkv * group, T, Dh, generator=generator).to(dtype) for _ in range(2))
    k, lk, v = (torch.randn(B, Hkv, T, Dh, generator=generator).to(dtype) for _ in range(3))
    torch.manual_seed(seed)
    shape = ExpertShape(Hkv * group, Dh, window, draw(st.integers(0, most_sinks)))
    experts = [
        expert_class(name)(shape).to(dtype if dtype == torch.float64 else torch.float32)
        for name in names
    ]
    return {
        "q": q,
        "k": k,
        "v": v,
        "linear_q": lq,
        "linear_k": lk,
        "route": route,
        "experts": experts,
        "window": window,
    }


def one_by_one(problem: dict[str, object]) -> Tensor:
    """Every expert over every token, then each token's own."""
    q, k, v, lq, lk, route = (
        problem[name] for name in ("q", "k", "v", "linear_q", "linear_k", "route")
    )
    outputs = [e(q, k, v) if e.rotary else e(lq, lk, v) for e in problem["experts"]]  # type: ignore[attr-defined]
    index = route[:, None, :, None].expand_as(outputs[0])  # type: ignore[index]
    return torch.stack(outputs).gather(0, index[None])[0]


def dispatch(problem: dict[str, object], backend: str = "torch") -> Tensor:
    return routed_attention(**{**problem, "backend": backend})  # type: ignore[arg-type]


@quick
@given(problems(dtypes=tuple(DTYPES)))
def test_dispatch_gives_each_token_its_own_expert(problem: dict[str, object]) -> None:
    want = one_by_one(problem)
    tolerance = DTYPES[want.dtype]
    for backend in ("torch", "dense"):
        got = dispatch(problem, backend)
        assert got.dtype == want.dtype and torch.isfinite(got).all()
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@quick
@given(problems(dtypes=(torch.float64,)), st.integers(0, 39))
def test_no_token_sees_a_later_one(problem: dict[str, object], place: int) -> None:
    before = dispatch(problem)
    T = before.shape[2]
    place = place % T
    for name in ("q", "k", "v", "linear_q", "linear_k"):
        changed = problem[name].clone()  # type: ignore[attr-defined]
        changed[:, :, place:] = 3.0
        problem[name] = changed
    problem["route"] = torch.cat([problem["route"][:, :place], 0 * problem["route"][:, place:]], 1)  # type: ignore[index]
    torch.testing.assert_close(
        dispatch(problem)[:, :, :place], before[:, :, :place], rtol=1e-5, atol=1e-5
    )


@quick
@given(problems(dtypes=(torch.float64,)), st.data())
def test_rows_right_of_their_length_are_zero_and_matter_to_nobody(
    problem: dict[str, object], data: st.DataObject
) -> None:
    B, _, T, _ = problem["q"].shape  # type: ignore[attr-defined]
    lengths = torch.tensor([data.draw(st.integers(1, T)) for _ in range(B)])
    got, whole = dispatch({**problem, "lengths": lengths}), dispatch(problem)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(
            got[row, :, :length], whole[row, :, :length], rtol=1e-5, atol=1e-5
        )
        assert not got[row, :, length:].any()


@quick
@given(problems(most_sinks=0), st.lists(st.integers(1, 39), max_size=5))
def test_any_cuts_through_the_cache_give_the_full_pass(
    problem: dict[str, object], cuts: list[int]
) -> None:
    q, k, v, lq, lk, route = (
        problem[name] for name in ("q", "k", "v", "linear_q", "linear_k", "route")
    )
    B, _, T, _ = q.shape  # type: ignore[attr-defined]
    edges = sorted({0, T, *(cut for cut in cuts if cut < T)})
    dtype = q.dtype  # type: ignore[attr-defined]
    cache = LayerCache(problem["experts"], B, T, k.shape[1], dtype=dtype)  # type: ignore[arg-type, attr-defined]
    parts = []
    with torch.no_grad():
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            pieces = [x[:, :, a:b] for x in (q, k, v)]  # type: ignore[index]
            linear = {"linear_q": lq[:, :, a:b], "linear_k": lk[:, :, a:b]}  # type: ignore[index]
            parts.append(cache.attend(*pieces, route[:, a:b], **linear))  # type: ignore[index]
        want = one_by_one(problem)
    tolerance = 1e-5 if dtype == torch.float64 else 1e-3  # linear states are kept in float32
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=tolerance, atol=tolerance)
    assert cache.lengths.tolist() == [T] * B


@settings(max_examples=15, deadline=None, derandomize=True)
@given(problems(dtypes=(torch.float64,)))
def test_gradients_of_dispatch_are_those_of_the_experts(problem: dict[str, object]) -> None:
    names = ("q", "k", "v", "linear_q", "linear_k")
    leaves = [problem[name].requires_grad_() for name in names]  # type: ignore[attr-defined]
    weight = torch.linspace(-1, 1, leaves[0].numel(), dtype=torch.float64).view_as(leaves[0])
    got = torch.autograd.grad(
        (dispatch(problem) * weight).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    want = torch.autograd.grad(
        (one_by_one(problem) * weight).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
