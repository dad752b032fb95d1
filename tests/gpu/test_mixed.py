"""Short texts that nothing sorts, and their backward pass, on a CUDA device.

`python -m pytest -m gpu tests/gpu/test_mixed.py`.
"""

from dataclasses import replace

import pytest
import torch

from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.hard.short import SHORT
from bayes_router.attention.kernels.capability import HAS_TRITON
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import relative_error
from tests.attention.seeds import DRAWN, seeded
from tests.gpu.test_routed_attention import NAMES, compare, draw, draw_route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not HAS_TRITON, reason="needs a CUDA device and Triton"
    ),
]
ROUTES = ["independent", "clustered", "rows differ", "full", "linear", "local"]


class _Unsorted:
    """The kernels as a backend, for whatever they compute."""

    name = "unsorted"

    def refuses(self, problem: RoutedProblem) -> str | None:
        return None

    def attend(self, problem: RoutedProblem) -> torch.Tensor:
        # only where Triton can be imported
        from bayes_router.attention.hard.mixed_launch import launch_mixed

        return launch_mixed(problem)


UNSORTED = _Unsorted()


@pytest.fixture(autouse=True)
def _seed() -> None:
    seeded(DRAWN)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("B", "Hkv", "T"), [(1, 4, 1537), (3, 2, 500), (2, 1, 64), (2, 4, 1)])
def test_values_and_gradients_agree_with_the_oracle(route: str, B: int, Hkv: int, T: int) -> None:
    compare(draw(B, 4, Hkv, T, 64, route), UNSORTED)
    compare(draw(B, 4, Hkv, T, 64, route, shared=True), UNSORTED)


@pytest.mark.parametrize("route", ["independent", "units differ"])
@pytest.mark.parametrize(("units", "Hkv"), [(2, 2), (4, 2), (4, 1), (4, 4)])
def test_every_unit_with_sinks_and_padding(route: str, units: int, Hkv: int) -> None:
    problem = draw(2, 4, Hkv, 500, 64, route, units=units, sinks=4)
    compare(problem, UNSORTED)
    compare(replace(problem, lengths=torch.tensor([500, 130], device="cuda")), UNSORTED)


@pytest.mark.parametrize("Dh", [16, 32, 40, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
def test_head_sizes_and_dtypes(Dh: int, dtype: torch.dtype, shared: bool) -> None:
    compare(draw(2, 2, 1, 700, Dh, "independent", dtype, shared=shared), UNSORTED)


@pytest.mark.parametrize("names", [("local", "full"), ("linear", "local"), ("linear",)])
def test_fewer_experts_and_some_elsewhere(names: tuple[str, ...]) -> None:
    problem = draw(2, 4, 2, 300, 64, "independent", window=9)
    route = problem.route % len(names)
    fewer = replace(problem, experts=resolve_experts(names, ExpertShape(4, 64, 9)), route=route)
    compare(fewer, UNSORTED)
    compare(replace(problem, elsewhere=frozenset({1})), UNSORTED)


@torch.no_grad()
def test_queries_that_start_anywhere() -> None:
    problem = draw(3, 4, 2, 900, 64, "independent")
    tail = {name: getattr(problem, name)[:, :, -100:] for name in ("q", "plain_q")}
    chunk = replace(problem, **tail, route=problem.route[:, -100:])
    compare(chunk, UNSORTED, gradients=False)
    starts = torch.tensor([0, 800, 123], device="cuda")
    compare(replace(chunk, starts=starts), UNSORTED, gradients=False)


def test_short_takes_it_where_it_pays_and_with_gradients_always() -> None:
    shared = draw(1, 2, 2, 100, 64, "independent", shared=True)
    apart = draw(1, 2, 2, 500, 64, "independent")
    for taken in (shared, apart, replace(shared, lengths=torch.tensor([90], device="cuda"))):
        assert SHORT.refuses(taken) is None
        torch.testing.assert_close(SHORT.attend(taken), UNSORTED.attend(taken), rtol=0, atol=0)
    with torch.no_grad():
        for problem, same in ((shared, True), (apart, False)):
            one, other = SHORT.attend(replace(problem)), UNSORTED.attend(replace(problem))
            assert torch.equal(one, other) is same


def test_no_future_leak() -> None:
    problem = draw(1, 4, 4, 1000, 64, "independent")
    with torch.no_grad():
        before = UNSORTED.attend(problem)
        later = {name: getattr(problem, name).clone() for name in NAMES}
        for x in later.values():
            x[:, :, 500:] += 3.0
        after = UNSORTED.attend(replace(problem, **later))
    assert relative_error(after[:, :, :500], before[:, :, :500].double()) < 5e-3
    # a problem remembers whether autograd records it
    early = UNSORTED.attend(replace(problem))[:, :, :500].sum()
    for name, gradient in zip(NAMES, _gradients(problem, early), strict=True):
        assert not gradient[:, :, 500:].any(), name


def _gradients(problem: RoutedProblem, of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(of, [getattr(problem, name) for name in NAMES])


def test_a_training_step_waits_for_nothing_and_a_graph_replays_it_with_new_routes() -> None:
    problem = draw(2, 4, 4, 512, 64, "independent")
    held = problem.route.clone()

    def step() -> tuple[torch.Tensor, ...]:
        out = UNSORTED.attend(replace(problem, route=held))
        return (out.detach(), *_gradients(problem, out.square().sum()))

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    held.copy_(draw_route("clustered", 2, 512, 3, units=1))
    graph.replay()
    for got, want in zip(replayed, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_scores_that_grow_along_the_keys() -> None:
    problem = draw(1, 4, 2, 700, 64, "full")
    growing = 20 * torch.linspace(0, 1, 700, device="cuda")[:, None].to(problem.k.dtype)
    with torch.no_grad():
        compare(replace(problem, k=problem.k * growing), UNSORTED, gradients=False)
