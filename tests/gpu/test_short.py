"""The two launches of short texts on a CUDA device.

`python -m pytest -m gpu tests/gpu/test_short.py`.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bayes_router.attention.experts.full import FullAttention
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.hard import short
from bayes_router.attention.hard.auto import BREAK_EVEN, choose_backend
from bayes_router.attention.hard.backend import Backend
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.hard.reference import REFERENCE
from bayes_router.attention.hard.short import SHORT
from bayes_router.attention.hard.sorted import TRITON
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import relative_error
from tests.attention.seeds import DRAWN, seeded
from tests.gpu.test_routed_attention import NAMES, TOLERANCE, compare, draw, draw_route, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two launches at any length; one launch is tests/gpu/test_mixed.py's."""
    seeded(DRAWN)
    monkeypatch.setattr(short, "unsorted_pays", lambda problem: False)
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "route", ["independent", "clustered", "rows differ", "full", "linear", "local"]
)
@pytest.mark.parametrize(("B", "Hkv", "T"), [(1, 4, 1537), (3, 2, 500), (2, 1, 64), (2, 4, 1)])
def test_agrees_with_the_oracle(route: str, B: int, Hkv: int, T: int) -> None:
    compare(draw(B, 4, Hkv, T, 64, route), SHORT, gradients=False)


@pytest.mark.parametrize("route", ["independent", "units differ"])
@pytest.mark.parametrize(
    ("units", "Hkv", "T"), [(2, 2, 1100), (4, 2, 1100), (4, 1, 130), (4, 2, 1)]
)
def test_every_unit_agrees_with_the_oracle(route: str, units: int, Hkv: int, T: int) -> None:
    compare(draw(2, 4, Hkv, T, 64, route, units=units, sinks=4), SHORT, gradients=False)


@pytest.mark.parametrize("route", ["independent", "full", "linear"])
@pytest.mark.parametrize(("T", "Dh"), [(1000, 64), (2000, 64), (4096, 64), (2000, 128)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_keys_in_segments_and_chunks(route: str, T: int, Dh: int, dtype: torch.dtype) -> None:
    """Often: segments of a block are joined by whichever program comes last."""
    problem = draw(2, 4, 2, T, Dh, route, dtype)
    want = REFERENCE.attend(exact(problem))
    for _ in range(20):
        assert relative_error(SHORT.attend(problem), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("Dh", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_head_sizes_and_dtypes(Dh: int, dtype: torch.dtype) -> None:
    compare(draw(2, 2, 1, 700, Dh, "independent", dtype), SHORT, gradients=False)


@pytest.mark.parametrize("window", [1, 64, 5000])
def test_windows_and_one_tensor_for_both_kinds_of_queries(window: int) -> None:
    compare(
        draw(1, 2, 2, 4096, 64, "independent", window=window, shared=True), SHORT, gradients=False
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("window", "sinks"), [(70, 1), (70, 4), (70, 300), (1, 4), (5000, 4), (70, 5000)]
)
@pytest.mark.parametrize(
    "names", [("full", "linear", "local"), ("full", "local"), ("linear", "local")]
)
def test_sinks(names: tuple[str, ...], window: int, sinks: int, dtype: torch.dtype) -> None:
    for route in ("independent", "clustered", "local"):
        problem = draw(2, 4, 2, 1100, 64, route, dtype, window=window)
        experts = resolve_experts(names, ExpertShape(4, 64, window, sinks))
        compare(
            replace(problem, experts=experts, route=problem.route % len(names)),
            SHORT,
            gradients=False,
        )


@pytest.mark.parametrize("sinks", [0, 4])
def test_padding_and_starts(sinks: int) -> None:
    problem = draw(3, 4, 2, 900, 64, "independent", sinks=sinks)
    compare(
        replace(problem, lengths=torch.tensor([900, 0, 333], device="cuda")), SHORT, gradients=False
    )
    tail = {name: getattr(problem, name)[:, :, -100:] for name in ("q", "plain_q")}
    chunk = replace(problem, **tail, route=problem.route[:, -100:])
    compare(chunk, SHORT, gradients=False)
    compare(
        replace(chunk, starts=torch.tensor([0, 800, 123], device="cuda")), SHORT, gradients=False
    )


def test_auto_takes_it_for_short_texts() -> None:
    problem = draw(1, 2, 2, 300, 64, "independent", shared=True)
    for gradients in (False, True):
        most = BREAK_EVEN[True, gradients].keys
        with torch.set_grad_enabled(gradients):
            assert choose_backend(replace(problem)) is SHORT
            assert choose_backend(draw(1, 2, 2, most, 64, "independent", shared=True)) is SHORT
            assert choose_backend(draw(1, 2, 2, most + 1, 64, "independent", shared=True)) is TRITON
    want = SHORT.attend(problem)
    inputs = {"linear_q": problem.plain_q, "linear_k": problem.plain_k}
    torch.testing.assert_close(
        routed_attention(problem.q, problem.k, problem.v, problem.route, window=70, **inputs), want
    )


def test_by_name_where_it_cannot_run_it_says_why() -> None:
    problem = draw(1, 2, 2, 300, 64, "independent")
    inputs = problem.q, problem.k, problem.v
    with (
        torch.enable_grad(),
        pytest.raises(
            RuntimeError,
            match="'short' cannot run here: its backward pass needs as many queries as keys; "
            "backend='auto'",
        ),
    ):
        tail = inputs[0][:, :, -100:], problem.k, problem.v
        routed_attention(*tail, problem.route[:, -100:], window=70, backend="short")
    for experts in (("full", "gated", "local"), ("full", "full", "local")):
        with pytest.raises(
            RuntimeError,
            match="it computes at most one each of the built-in experts full, linear and local",
        ):
            routed_attention(*inputs, problem.route, window=70, backend="short", experts=experts)
    long = draw(1, 2, 2, 4097, 64, "independent")
    with pytest.raises(RuntimeError, match="it sorts up to 4096 queries; these are 4097"):
        routed_attention(long.q, long.k, long.v, long.route, window=70, backend="short")
    wide = draw(1, 2, 2, 300, 160, "independent")
    with pytest.raises(
        RuntimeError, match="it holds head sizes up to 128 in torch.bfloat16; this is 160"
    ):
        routed_attention(wide.q, wide.k, wide.v, wide.route, window=70, backend="short")
    with pytest.raises(
        RuntimeError, match="it computes float32, bfloat16 and float16; these are torch.float64"
    ):
        routed_attention(*(x.double() for x in inputs), problem.route, window=70, backend="short")


def test_no_future_leak() -> None:
    problem = draw(1, 4, 4, 2000, 64, "independent")
    before = SHORT.attend(problem)
    later = {name: getattr(problem, name).clone() for name in NAMES}
    for x in later.values():
        x[:, :, 1000:] += 3.0
    route = problem.route.clone()
    route[:, 1000:] = (route[:, 1000:] + 1) % 3
    after = SHORT.attend(replace(problem, **later, route=route))
    assert relative_error(after[:, :, :1000], before[:, :, :1000].double()) < 5e-3


def test_new_routes_neither_recompile_nor_synchronise_and_a_graph_replays_them() -> None:
    problem = draw(2, 4, 4, 1024, 64, "independent")
    SHORT.attend(problem)
    route = draw_route("clustered", 2, 1024, 2, units=1).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = SHORT.attend(replace(problem, route=route))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = problem.route.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = SHORT.attend(replace(problem, route=held))
    held.copy_(route)
    graph.replay()
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_full_and_local_are_sorted_in_a_graph() -> None:
    """Where launches cost the host nothing; the same values, local beside full attention."""
    torch.manual_seed(0)
    B, H, T = 2, 8, 1100
    q, k, v = (
        torch.randn(B, heads, T, 64, device="cuda", dtype=torch.bfloat16) for heads in (H, 2, 2)
    )
    shape = ExpertShape(H, 64, 300)
    experts = FullAttention(shape), LocalAttention(shape._replace(sinks=3))
    for units in (1, 2, H):
        route = (torch.rand(B, T, units, device="cuda") < 0.7).long()
        problem, found = RoutedProblem(q, k, v, q, k, route, experts, None, None), list[Backend]()
        assert choose_backend(problem) is SHORT
        want = SHORT.attend(problem)
        TRITON.attend(problem)  # compiled before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append(choose_backend(problem))
            out = routed_attention(q, k, v, route, window=300, experts=experts)
        assert found == [TRITON]
        for _ in range(3):
            out.zero_()
            graph.replay()
            torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
