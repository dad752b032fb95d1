"""Gated, linear and local attention by the kernels on a CUDA device, over every token and routed.

`python -m pytest -m gpu`.

The truth is each expert's own float64 pass. Tolerances as in `test_routed_attention`: 1e-2 for
bfloat16 and float16, 1e-5 for float32, twice that for gradients.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.hard.reference import REFERENCE
from bayes_router.attention.hard.sorted import TRITON
from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.triton import operators
from bayes_router.attention.shapes import ExpertShape
from tests.attention.dense_check import draw_expert, draw_inputs, errors
from tests.attention.expert_contract import relative_error
from tests.attention.test_dispatch import ROUTES, draw_route

available = torch.cuda.is_available() and capability.HAS_TRITON
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not available, reason="needs a CUDA device and Triton"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
NAMES = ("gated", "mapped", "linear", "local")
EXPERTS = ("full", "gated", "local")


def check(found: dict[str, float], dtype: torch.dtype) -> None:
    for name, error in found.items():
        assert error < TOLERANCE[dtype] * (1 if name == "out" else 2), found


def compare(
    name: str, B: int, H: int, Hkv: int, T: int, Dh: int, dtype: torch.dtype, window: int = 70
) -> None:
    expert, inputs = (
        draw_expert(name, ExpertShape(H, Dh, window), "cuda"),
        draw_inputs(B, H, Hkv, T, Dh, dtype, "cuda"),
    )
    assert capability.available(*inputs) is (dtype != torch.float32 or Dh <= 64)
    check(errors(expert, inputs), dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("B", "Hkv", "T"), [(1, 4, 1537), (3, 2, 500), (2, 1, 64), (2, 4, 1), (1, 2, 6000)]
)
def test_every_token_at_once(name: str, dtype: torch.dtype, B: int, Hkv: int, T: int) -> None:
    compare(name, B, 4, Hkv, T, 64, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("Dh", [32, 64, 80, 128])
def test_head_sizes(name: str, dtype: torch.dtype, Dh: int) -> None:
    compare(name, 2, 2, 1, 700, Dh, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("B", "T", "window"), [(2, 300, 1), (1, 2, 1), (2, 1000, 64), (1, 1000, 999)]
)
def test_windows(dtype: torch.dtype, B: int, T: int, window: int) -> None:
    compare("local", B, 4, 2, T, 64, dtype, window)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("T", "window", "sinks"), [(300, 1, 1), (1500, 64, 4), (1000, 100, 200)])
def test_windows_with_sinks(dtype: torch.dtype, T: int, window: int, sinks: int) -> None:
    expert = draw_expert("local", ExpertShape(4, 64, window, sinks), "cuda")
    check(errors(expert, draw_inputs(2, 4, 2, T, 64, dtype, "cuda")), dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_one_token_one_head_one_row(name: str, dtype: torch.dtype) -> None:
    """Every number that a kernel is told is 1."""
    compare(name, 1, 1, 1, 1, 16, dtype, window=1)


def routed_errors(problem: RoutedProblem) -> dict[str, float]:
    """As `errors`, of a routed pass; queries and keys of both kinds are the same tensors."""
    truths = tuple(copy.deepcopy(expert).double() for expert in problem.experts)
    eq, ek, ev = (x.detach().double().requires_grad_() for x in (problem.q, problem.k, problem.v))
    exact = replace(problem, q=eq, k=ek, v=ev, plain_q=eq, plain_k=ek, experts=truths)
    got, want = TRITON.attend(problem), REFERENCE.attend(exact)
    weight = torch.randn(got.shape, device="cuda")
    own, known = (
        [p for e in experts for p in e.parameters()] for experts in (problem.experts, truths)
    )
    inputs = problem.q, problem.k, problem.v
    grads = torch.autograd.grad((got * weight).sum(), [*inputs, *own], allow_unused=True)
    wanted = torch.autograd.grad(
        (want * weight.double()).sum(), [eq, ek, ev, *known], allow_unused=True
    )
    pairs = zip(grads, wanted, [*inputs, *own], strict=True)
    full = [[torch.zeros_like(x) if y is None else y for y in (g, t)] for g, t, x in pairs]
    beside = full[2][1].double(), 1.0 if problem.q.shape[2] == 1 else 0.05
    found = {
        name: relative_error(g, t.double(), *beside)
        for name, (g, t) in zip("qkv", full[:3], strict=True)
    }
    both = (torch.cat([pair[i].double().flatten() for pair in full[3:]]) for i in (0, 1))
    found["parameters"] = relative_error(*both, *beside)
    return {"out": relative_error(got, want.double()), **found}


def draw_problem(
    B: int,
    Hkv: int,
    T: int,
    Dh: int,
    route: str,
    dtype: torch.dtype,
    names: tuple[str, ...] = EXPERTS,
    window: int = 70,
) -> RoutedProblem:
    torch.manual_seed(0)
    q, k, v = draw_inputs(B, 4, Hkv, T, Dh, dtype, "cuda")
    experts = tuple(draw_expert(name, ExpertShape(4, Dh, window), "cuda") for name in names)
    return RoutedProblem(q, k, v, q, k, draw_route(route, B, T, units=1).cuda(), experts)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("B", "Hkv", "T"), [(1, 4, 1537), (3, 2, 500), (2, 1, 64), (2, 4, 1)])
def test_gated_among_routed_experts(
    route: str, dtype: torch.dtype, B: int, Hkv: int, T: int
) -> None:
    # only where it can be imported
    from bayes_router.attention.hard.sorted_launch import native_experts

    problem = draw_problem(B, Hkv, T, 64, route, dtype)
    assert native_experts(problem) == (0, 1, 2)
    check(routed_errors(problem), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("Dh", [32, 80, 128])
def test_gated_head_sizes(dtype: torch.dtype, Dh: int) -> None:
    check(routed_errors(draw_problem(2, 2, 700, Dh, "independent", dtype)), dtype)


def test_gated_in_a_long_text() -> None:
    check(
        routed_errors(draw_problem(1, 2, 6000, 64, "independent", torch.bfloat16, window=256)),
        torch.bfloat16,
    )


def test_gated_and_linear_together_and_padding() -> None:
    for names in (("gated", "linear", "local"), ("linear", "gated", "full")):
        problem = draw_problem(3, 2, 500, 64, "independent", torch.bfloat16, names)
        lengths = torch.tensor([500, 1, 333], device="cuda")
        check(routed_errors(replace(problem, lengths=lengths)), torch.bfloat16)


def test_gated_after_a_past() -> None:
    problem = draw_problem(3, 2, 900, 64, "independent", torch.bfloat16)
    truths = tuple(copy.deepcopy(expert).double() for expert in problem.experts)
    with torch.no_grad():
        q = problem.q[:, :, -100:]
        tail = replace(problem, q=q, plain_q=q, route=problem.route[:, -100:])
        for one in (tail, replace(tail, starts=torch.tensor([0, 800, 123], device="cuda"))):
            eq, ek, ev = (x.double() for x in (one.q, one.k, one.v))
            exact = replace(one, q=eq, k=ek, v=ev, plain_q=eq, plain_k=ek, experts=truths)
            want = REFERENCE.attend(exact)
            assert relative_error(TRITON.attend(one), want.double()) < 1e-2


def test_gates_that_keep_all_or_nothing() -> None:
    """32,768 tokens: the sum of the log gates is -4000, or 0, or -2.6 million."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 32768, 64, device="cuda") for _ in range(3))
    phi_q, phi_k = q.softmax(-1), k.softmax(-1)
    for gate in (-0.12, 0.0, -80.0):
        log_gate = torch.full((1, 1, 32768), gate, device="cuda", requires_grad=True)
        out = operators.linear_attention(phi_q, phi_k, v, log_gate)
        # tokens since each key, at the end of the text
        last = torch.arange(32768, device="cuda").double().flip(0)
        weight = (phi_q[0, 0, -1].double() @ phi_k[0, 0].double().T) * (last * gate).exp()
        want = weight @ v[0, 0].double() / (weight.sum() + 1e-6)
        assert relative_error(out[0, 0, -1], want) < 1e-5
        assert torch.autograd.grad(out.square().sum(), log_gate)[0].isfinite().all()


@pytest.mark.parametrize("name", [*NAMES, "routed"])
def test_a_captured_step_is_the_step(name: str) -> None:
    """Forward and backward, replayed from a CUDA graph with other inputs.

    Against the same computed anew.
    """
    inputs = draw_inputs(2, 4, 2, 700, 64, torch.bfloat16, "cuda")
    experts = tuple(draw_expert(each, ExpertShape(4, 64, 70), "cuda") for each in EXPERTS)
    expert = draw_expert(name, ExpertShape(4, 64, 70), "cuda") if name != "routed" else None
    route = draw_route("independent", 2, 700, units=1).cuda()

    def step() -> tuple[Tensor, ...]:
        q, k, v = inputs
        out = (
            expert(q, k, v)
            if expert
            else TRITON.attend(RoutedProblem(q, k, v, q, k, route, experts))
        )
        return (out, *torch.autograd.grad(out.float().square().sum(), inputs))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
        route.copy_(draw_route("clustered", 2, 700, 5, units=1))
    graph.replay()
    replayed = [x.clone() for x in captured]
    for got, want in zip(replayed, step(), strict=True):
        # splits of full attention may be summed in another order
        assert relative_error(got, want.double()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_is_the_same(name: str) -> None:
    expert, inputs = (
        draw_expert(name, ExpertShape(4, 64, 70), "cuda"),
        draw_inputs(2, 4, 2, 700, 64, torch.bfloat16, "cuda"),
    )
    compiled = torch.compile(expert, fullgraph=True)
    results = [
        (out, *torch.autograd.grad(out.float().square().sum(), inputs))
        for out in (expert(*inputs), compiled(*inputs))
    ]
    for want, got in zip(*results, strict=True):
        assert relative_error(got, want.double()) < 1e-2


def test_it_does_not_wait_for_the_device() -> None:
    inputs = draw_inputs(2, 4, 2, 700, 64, torch.bfloat16, "cuda")
    experts = [draw_expert(name, ExpertShape(4, 64, 70), "cuda") for name in NAMES]
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for expert in experts:
                expert(*inputs).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
