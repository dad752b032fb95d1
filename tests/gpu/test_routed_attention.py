"""Hard routing on a CUDA device: `python -m pytest -m gpu tests/gpu`.

Every backend against the float64 oracle.

Tolerances are relative errors of whole tensors: 1e-2 for bfloat16 and float16 (rounding of operands
is 4e-3), 1e-5 for float32.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import expert_class
from bayes_router.attention.hard.backend import Backend
from bayes_router.attention.hard.dense import DENSE
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.hard.reference import REFERENCE
from bayes_router.attention.hard.rows import TORCH
from bayes_router.attention.hard.sorted import TRITON
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import relative_error
from tests.attention.seeds import DRAWN, seeded
from tests.attention.test_dispatch import ROUTES, Squared, draw_route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
NAMES = ("q", "k", "v", "plain_q", "plain_k")


@pytest.fixture(autouse=True)
def _other_numbers_every_run() -> None:
    seeded(DRAWN)


def draw(
    B: int,
    H: int,
    Hkv: int,
    T: int,
    Dh: int,
    route: str,
    dtype: torch.dtype = torch.bfloat16,
    window: int = 70,
    shared: bool = False,
    sinks: int = 0,
    units: int = 1,
) -> RoutedProblem:
    """Inputs laid out as a model's: [B, T, H, Dh] in memory."""

    def one(heads: int) -> Tensor:
        return (
            torch.randn(B, T, heads, Dh, device="cuda").to(dtype).transpose(1, 2).requires_grad_()
        )

    q, k, v = one(H), one(Hkv), one(Hkv)
    plain_q, plain_k = (q, k) if shared else (one(H), one(Hkv))
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(H, Dh, window, sinks))
    seed = int(torch.randint(2**31, ()))
    return RoutedProblem(
        q, k, v, plain_q, plain_k, draw_route(route, B, T, seed, units).cuda(), experts
    )


def exact(problem: RoutedProblem) -> RoutedProblem:
    made: dict[int, Tensor] = {}
    for name in NAMES:
        x = getattr(problem, name)
        made.setdefault(id(x), x.detach().double().requires_grad_())
    return replace(problem, **{name: made[id(getattr(problem, name))] for name in NAMES})


def compare(problem: RoutedProblem, backend: Backend, gradients: bool = True) -> None:
    reason = backend.refuses(problem)
    if reason:
        pytest.skip(reason)
    true = exact(problem)
    got, want = backend.attend(problem), REFERENCE.attend(true)
    tolerance = TOLERANCE[problem.q.dtype]
    assert relative_error(got, want) < tolerance
    if not gradients:
        return
    weight = torch.randn_like(got)
    names = [
        n
        for i, n in enumerate(NAMES)
        if id(getattr(problem, n)) not in {id(getattr(problem, m)) for m in NAMES[:i]}
    ]
    grads = torch.autograd.grad(
        (got * weight).sum(), [getattr(problem, n) for n in names], allow_unused=True
    )
    truths = torch.autograd.grad(
        (want * weight.double()).sum(), [getattr(true, n) for n in names], allow_unused=True
    )
    for name, g, t in zip(names, grads, truths, strict=True):
        zero = torch.zeros((), device="cuda")
        assert (
            relative_error(zero if g is None else g, zero.double() if t is None else t)
            < 2 * tolerance
        ), name


@pytest.mark.parametrize("backend", [TRITON, DENSE, TORCH], ids=lambda backend: backend.name)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("B", "Hkv", "T"), [(1, 4, 1537), (3, 2, 500), (2, 1, 64), (2, 4, 1)])
def test_agrees_with_the_oracle(backend: Backend, route: str, B: int, Hkv: int, T: int) -> None:
    compare(draw(B, 4, Hkv, T, 64, route), backend)


@pytest.mark.parametrize("backend", [TRITON, DENSE, TORCH], ids=lambda backend: backend.name)
@pytest.mark.parametrize("route", ["independent", "clustered", "units differ"])
@pytest.mark.parametrize(
    ("units", "Hkv", "T"), [(2, 2, 1537), (4, 2, 1537), (4, 1, 500), (4, 4, 64)]
)
def test_every_unit_agrees_with_the_oracle(
    backend: Backend, route: str, units: int, Hkv: int, T: int
) -> None:
    problem = draw(2, 4, Hkv, T, 64, route, units=units)
    compare(problem, backend)
    compare(replace(problem, lengths=torch.tensor([T, T // 3], device="cuda")), backend)


@pytest.mark.parametrize("Dh", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_head_sizes_and_dtypes(Dh: int, dtype: torch.dtype) -> None:
    compare(draw(2, 2, 1, 700, Dh, "independent", dtype), TRITON)


@pytest.mark.parametrize("name", ["full", "local"])
@pytest.mark.parametrize("first", ["BTHD", "BHTD"])
def test_gradients_in_one_layout_after_another(name: str, first: str) -> None:
    """cuDNN's backward pass reads a gradient by the strides of the first that it saw (`fused`)."""
    shape = ExpertShape(4, 64, 2000 if name == "local" else 70, sinks=4)
    problem = draw(2, 4, 2, 1000 + 8 * (first == "BTHD") + 16 * (name == "local"), 64, "full")
    inputs = problem.q, problem.k, problem.v
    true = [x.detach().double().requires_grad_() for x in inputs]
    got, want = (expert_class(name)(shape)(*xs) for xs in (inputs, true))
    weight = torch.randn_like(got, memory_format=torch.contiguous_format)
    truths = torch.autograd.grad(want, true, weight.double())
    strided = weight.transpose(1, 2).contiguous().transpose(1, 2)
    for one in (strided, weight) if first == "BTHD" else (weight, strided):
        grads = torch.autograd.grad(got, inputs, one, retain_graph=True)
        assert all(relative_error(g, t) < 2e-2 for g, t in zip(grads, truths, strict=True))


def test_split_rows_and_one_tensor_for_both_kinds_of_queries() -> None:
    compare(draw(1, 2, 2, 6000, 64, "independent", window=256, shared=True), TRITON)
    compare(draw(1, 2, 2, 6000, 64, "full", shared=True), TRITON)
    compare(draw(2, 2, 2, 5000, 64, "rows differ"), TRITON)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_of_128(dtype: torch.dtype) -> None:
    """By warps with roles on Hopper: split rows, units, padding, starts, strides that TMA lacks."""
    compare(draw(1, 4, 2, 6000, 128, "independent", dtype, 256, shared=True, units=4), TRITON)
    compare(draw(1, 2, 1, 5000, 128, "full", dtype, shared=True), TRITON)
    compare(draw(1, 2, 1, 700, 128, "local", dtype), TRITON)
    problem = draw(2, 4, 1, 1537, 128, "clustered", dtype)
    compare(replace(problem, lengths=torch.tensor([1537, 200], device="cuda")), TRITON)
    with torch.no_grad():
        tail = {name: getattr(problem, name)[:, :, -100:] for name in ("q", "plain_q")}
        chunk = replace(problem, **tail, route=problem.route[:, -100:])
        starts = torch.tensor([1437, 500], device="cuda")
        compare(replace(chunk, starts=starts), TRITON, gradients=False)
        wide = torch.randn(2, 1, 1537, 129, device="cuda").to(dtype)[..., :128]
        compare(replace(problem, k=wide, v=wide), TRITON, gradients=False)


@pytest.mark.parametrize("backend", [TRITON, DENSE, TORCH], ids=lambda backend: backend.name)
@pytest.mark.parametrize("route", ["independent", "clustered", "local"])
@pytest.mark.parametrize(
    ("window", "sinks"), [(70, 1), (70, 4), (70, 300), (1, 4), (5000, 4), (70, 5000)]
)
def test_sinks(backend: Backend, route: str, window: int, sinks: int) -> None:
    compare(draw(2, 4, 2, 1537, 64, route, window=window, sinks=sinks), backend)


@pytest.mark.parametrize("Dh", [64, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_sinks_by_head_size_and_dtype(Dh: int, dtype: torch.dtype) -> None:
    compare(draw(2, 6, 2, 700, Dh, "independent", dtype, sinks=4), TRITON)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("backend", [TRITON, DENSE], ids=lambda backend: backend.name)
def test_padding_and_starts(backend: Backend, sinks: int) -> None:
    problem = draw(3, 4, 2, 900, 64, "independent", sinks=sinks)
    compare(replace(problem, lengths=torch.tensor([900, 1, 333], device="cuda")), backend)
    with torch.no_grad():
        tail = {name: getattr(problem, name)[:, :, -100:] for name in ("q", "plain_q")}
        chunk = replace(problem, **tail, route=problem.route[:, -100:])
        compare(chunk, backend, gradients=False)
        compare(
            replace(chunk, starts=torch.tensor([0, 800, 123], device="cuda")),
            backend,
            gradients=False,
        )


def test_two_streams_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention beside the other experts, as in long texts: gradients, eager, from a graph."""
    from bayes_router.attention.kernels.triton import call

    monkeypatch.setattr(call, "BESIDE", 0)
    monkeypatch.setattr(call, "BESIDE_TRAINED", 0)
    for route in ("independent", "full", "clustered"):
        compare(draw(2, 4, 2, 1537, 64, route, shared=True), TRITON)
    problem = draw(1, 4, 2, 3000, 64, "independent", units=4)
    with torch.no_grad():
        want = TRITON.attend(problem)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = TRITON.attend(problem)
        for _ in range(3):
            got.zero_()
            graph.replay()
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_custom_experts_compute_their_own_rows() -> None:
    problem = draw(2, 4, 2, 300, 64, "independent")
    mine = Squared(ExpertShape(4, 64, 70)).cuda()
    compare(replace(problem, experts=(problem.experts[0], mine, problem.experts[2])), TRITON)


@pytest.mark.parametrize("sinks", [0, 4, 1500])
def test_no_future_leak(sinks: int) -> None:
    problem = draw(1, 4, 4, 2000, 64, "independent", sinks=sinks)
    with torch.no_grad():
        before = TRITON.attend(problem)
        later = {name: getattr(problem, name).clone() for name in NAMES}
        for x in later.values():
            x[:, :, 1000:] += 3.0
        route = problem.route.clone()
        route[:, 1000:] = (route[:, 1000:] + 1) % 3
        after = TRITON.attend(replace(problem, **later, route=route))
    assert relative_error(after[:, :, :1000], before[:, :, :1000].double()) < 5e-3


def test_new_routes_neither_recompile_nor_synchronise(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from bayes_router.attention.kernels.triton import launch  # only where it can be imported

    problem = draw(2, 4, 4, 1024, 64, "independent")
    TRITON.attend(problem).sum().backward()
    compiled, known = [], set(launch._COMPILED)
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **facts: compiled.append(facts)
    )
    routes = [draw_route(kind, 2, 1024, 2, units=1).cuda() for kind in ROUTES]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for route in routes:
            TRITON.attend(replace(problem, route=route)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled and set(launch._COMPILED) == known


BAD_ROUTE = """
import sys, torch
from bayes_router import routed_attention
backend, value, recorded = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "recorded"
options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": recorded}
q, k, v = (torch.randn(2, 4, 200, 64, **options) for _ in range(3))
route = torch.zeros(2, 200, dtype=torch.long, device="cuda")
lengths = torch.tensor([200, 150], device="cuda")
route[1, 150:] = value  # padding is not looked at
routed_attention(q, k, v, route, window=9, backend=backend, lengths=lengths)
torch.cuda.synchronize()
print("padding passed", flush=True)
route[1, 149] = value
routed_attention(q, k, v, route, window=9, backend=backend, lengths=lengths)
torch.cuda.synchronize()
print("nobody noticed")
"""


@pytest.mark.parametrize(
    ("backend", "value", "recorded"),
    [
        ("triton", 3, "recorded"),
        ("short", -1, ""),
        ("dense", 3, ""),
        ("dense", -1, "recorded"),
        ("torch", 7, ""),
    ],
)
def test_a_route_out_of_range_is_an_assertion_on_the_device(
    backend: str, value: int, recorded: str
) -> None:
    """In a process of its own: after the assertion the device is lost to it."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", BAD_ROUTE, backend, str(value), recorded]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert ended.stdout == "padding passed\n", ended.stderr
    assert ended.returncode != 0 and "assert" in ended.stderr.lower()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["triton", "short", "dense"])
def test_tensors_of_another_device_than_the_current_one(backend: str) -> None:
    problem = draw(2, 4, 2, 500, 64, "independent")
    inputs = [
        getattr(problem, name).detach().to("cuda:1").requires_grad_(backend != "short")
        for name in NAMES
    ]
    q, k, v, linear_q, linear_k = inputs
    arguments = {"window": 70, "linear_q": linear_q, "linear_k": linear_k}
    out = routed_attention(q, k, v, problem.route.to("cuda:1"), backend=backend, **arguments)
    if backend != "short":
        out.sum().backward()
    want = REFERENCE.attend(exact(problem))
    assert (
        out.device == torch.device("cuda:1")
        and relative_error(out.cuda(0), want) < TOLERANCE[q.dtype]
    )


@pytest.mark.parametrize(
    "names", [("full", "linear", "local"), ("full", "local"), ("linear",), ("local",), ("full",)]
)
@pytest.mark.parametrize(
    ("Hkv", "dtype"), [(4, torch.bfloat16), (1, torch.bfloat16), (2, torch.float32)]
)
def test_cache_equals_the_full_pass(names: tuple[str, ...], Hkv: int, dtype: torch.dtype) -> None:
    B, H, T, Dh, window = 3, 4, 1300, 64, 70
    experts = tuple(expert_class(name)(ExpertShape(H, Dh, window)) for name in names)
    problem = draw(B, H, Hkv, T, Dh, "independent", dtype, window)
    route = problem.route % len(names)
    whole = REFERENCE.attend(exact(replace(problem, experts=experts, route=route)))
    cache = LayerCache(experts, B, T, Hkv, device="cuda", dtype=dtype)
    parts = []
    for a, b in ((0, 600), (600, 1250), *((t, t + 1) for t in range(1250, 1300))):
        q, k, v, pq, pk = (getattr(problem, name).detach()[:, :, a:b] for name in NAMES)
        parts.append(cache.attend(q, k, v, route[:, a:b], linear_q=pq, linear_k=pk))
    assert relative_error(torch.cat(parts, 2), whole) < TOLERANCE[dtype]


def test_a_decoding_step_does_not_synchronise() -> None:
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, 64, 70))
    cache = LayerCache(experts, 2, 600, 4, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    route = torch.tensor([[0], [1]], device="cuda")
    cache.attend(q, q, q, route)
    cache.attend(q, q, q, route)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.attend(q, q, q, route)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_int_costs_what_the_expert_costs() -> None:
    problem = draw(1, 4, 4, 300, 64, "full", shared=True)
    want = expert_class("full")(ExpertShape(4, 64, 70))(problem.q, problem.k, problem.v)
    torch.testing.assert_close(
        routed_attention(problem.q, problem.k, problem.v, 0, window=70), want
    )
