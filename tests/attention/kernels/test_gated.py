"""The Triton kernels of gated, linear and local attention in Triton's interpreter.

`TRITON_INTERPRET=1 python -m pytest`.

It needs no GPU; float32 only (the interpreter takes products of bfloat16 for those of integers) and
small sizes.
"""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from dataclasses import replace

from bayes_router.attention.hard import sorted_launch as backend
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.hard.reference import REFERENCE, softmax_attention
from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.triton import operators
from bayes_router.attention.shapes import ExpertShape
from bayes_router.integrations.calls import softmax
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.layer import RoutedLayer
from tests.attention.dense_check import draw_expert, draw_inputs, errors
from tests.attention.expert_contract import gradient_errors, relative_error
from tests.attention.test_dispatch import draw_route


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def available(q: Tensor, k: Tensor, v: Tensor) -> bool:
        return q.dtype != torch.float64 and 0 < q.shape[2] == k.shape[2]

    monkeypatch.setattr(capability, "available", available)
    monkeypatch.setattr(capability, "computes", lambda *xs: xs[0].dtype != torch.float64)


@pytest.mark.parametrize("name", ["gated", "mapped", "linear", "local"])
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "T", "Dh", "window"),
    [(1, 2, 1, 1, 16, 1), (2, 2, 1, 70, 16, 1), (1, 2, 2, 150, 24, 9), (1, 4, 2, 64, 8, 63)],
)
def test_every_token_at_once(
    name: str, B: int, H: int, Hkv: int, T: int, Dh: int, window: int, fresh_seed: int
) -> None:
    expert = draw_expert(name, ExpertShape(H, Dh, window))
    found = errors(expert, draw_inputs(B, H, Hkv, T, Dh, seed=fresh_seed))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    ("Hkv", "T", "window", "sinks"),
    [(1, 70, 1, 1), (2, 150, 9, 4), (1, 130, 20, 40), (2, 64, 63, 3)],
)
def test_every_token_on_local_with_sinks(Hkv: int, T: int, window: int, sinks: int) -> None:
    expert = draw_expert("local", ExpertShape(2, 16, window, sinks))
    found = errors(expert, draw_inputs(2, 2, Hkv, T, 16))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_patched_layer_on_local_alone_takes_the_kernel(
    sinks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.detach() for x in draw_inputs(1, 4, 2, 80, 16))
    call = AttentionCall(
        q, k, v, None, True, lambda *_: pytest.fail("the layer's own kernel"), 0.3, plain=True
    )
    layer = RoutedLayer(("full", "local"), ExpertShape(4, 16, 9), 2, sinks, causal=True)
    monkeypatch.setattr(softmax, "banded", lambda *_: pytest.fail("written out"))
    monkeypatch.setattr(softmax, "softmax_rows", lambda *_: pytest.fail("written out"))
    want = softmax_attention(0.3 * 4.0 * q.double(), k.double(), v.double(), 9, sinks)
    with torch.enable_grad():
        assert relative_error(layer.attend(call, 1), want) < 1e-5


@pytest.mark.parametrize("log_gate", [0.0, -1e-3, -80.0])
def test_gates_that_keep_all_or_nothing(log_gate: float) -> None:
    """At -80 a token, 150 tokens would be exp(-12000): a token sees itself alone."""
    q, k, v = draw_inputs(1, 1, 1, 150, 16)
    phi_q, phi_k = q.detach().softmax(-1), k.detach().softmax(-1)
    gates = torch.full((1, 1, 150), log_gate, requires_grad=True)
    out = operators.linear_attention(phi_q, phi_k, v, gates)
    decay = gates.detach().double().cumsum(-1)
    weight = (phi_q @ phi_k.transpose(-1, -2)).double() * (
        decay[..., :, None] - decay[..., None, :]
    ).tril().exp().tril()
    assert (
        relative_error(out, weight @ v.detach().double() / (weight.sum(-1, keepdim=True) + 1e-6))
        < 1e-5
    )
    out.square().sum().backward()
    assert (
        gates.grad is not None
        and gates.grad.isfinite().all()
        and v.grad is not None
        and v.grad.isfinite().all()
    )


@pytest.mark.parametrize(
    "names", [("full", "gated", "local"), ("gated", "linear", "local"), ("full", "mapped", "local")]
)
@pytest.mark.parametrize(("B", "Hkv", "T", "units"), [(2, 1, 130, 1), (1, 2, 1, 1), (2, 1, 130, 2)])
def test_routed(
    names: tuple[str, ...], B: int, Hkv: int, T: int, units: int, fresh_seed: int
) -> None:
    """The first of gated and linear has the kernels, the other computes its own rows.

    Rows of padding are zero.
    """
    experts = tuple(draw_expert(name, ExpertShape(2, 16, 9)) for name in names)
    q, k, v = draw_inputs(B, 2, Hkv, T, 16, seed=fresh_seed)
    lengths = torch.full((B,), T)
    lengths[-1] = max(T - 40, 1)
    problem = RoutedProblem(
        q, k, v, q, k, draw_route("independent", B, T, fresh_seed, units), experts, lengths
    )
    eq, ek, ev = (x.detach().double().requires_grad_() for x in (q, k, v))
    exact = replace(problem, q=eq, k=ek, v=ev, plain_q=eq, plain_k=ek)
    got, want = backend.launch_sorted(problem), REFERENCE.attend(exact)
    assert relative_error(got, want) < 1e-5
    weight, parameters = (
        torch.randn(got.shape),
        [p for expert in experts for p in expert.parameters()],
    )
    grads = torch.autograd.grad((got * weight).sum(), [q, k, v, *parameters])
    truths = torch.autograd.grad((want * weight.double()).sum(), [eq, ek, ev, *parameters])
    assert max(gradient_errors(grads, truths)) < 2e-5


@pytest.mark.parametrize(
    ("window", "sinks"), [(9, 1), (9, 4), (9, 70), (1, 4), (200, 4), (9, 1000)]
)
@pytest.mark.parametrize(("kind", "Hkv"), [("independent", 1), ("clustered", 2), ("local", 1)])
def test_routed_with_sinks(kind: str, Hkv: int, window: int, sinks: int) -> None:
    B, T = 2, 150
    experts = tuple(
        draw_expert(name, ExpertShape(2, 16, window, sinks)) for name in ("full", "linear", "local")
    )
    q, k, v = draw_inputs(B, 2, Hkv, T, 16)
    problem = RoutedProblem(
        q, k, v, q, k, draw_route(kind, B, T, units=1), experts, torch.tensor([T, 100])
    )
    eq, ek, ev = (x.detach().double().requires_grad_() for x in (q, k, v))
    exact = replace(problem, q=eq, k=ek, v=ev, plain_q=eq, plain_k=ek)
    got, want = backend.launch_sorted(problem), REFERENCE.attend(exact)
    assert relative_error(got, want) < 1e-5
    weight = torch.randn(got.shape)
    grads = torch.autograd.grad((got * weight).sum(), (q, k, v))
    truths = torch.autograd.grad((want * weight.double()).sum(), (eq, ek, ev))
    for g, t in zip(grads, truths, strict=True):
        assert relative_error(g, t) < 2e-5
    tail = {name: getattr(problem, name).detach()[:, :, -40:] for name in ("q", "plain_q")}
    fixed = replace(problem, k=k.detach(), v=v.detach(), plain_k=k.detach(), lengths=None, **tail)
    for starts in (None, torch.tensor([0, 73])):
        chunk = replace(fixed, route=problem.route[:, -40:], starts=starts)
        assert relative_error(backend.launch_sorted(chunk), REFERENCE.attend(chunk).double()) < 1e-5


@pytest.mark.parametrize("name", ["gated", "mapped", "linear", "local"])
def test_it_compiles_without_a_break(name: str) -> None:
    expert, inputs = draw_expert(name, ExpertShape(2, 16, 9)), draw_inputs(1, 2, 1, 40, 16)
    compiled = torch.compile(expert, backend="aot_eager", fullgraph=True)
    results = [
        (out, *torch.autograd.grad(out.square().sum(), inputs))
        for out in (expert(*inputs), compiled(*inputs))
    ]
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shared", [True, False])
def test_the_operators_tell_the_truth_about_themselves(shared: bool) -> None:
    q, k, v = draw_inputs(1, 2, 1, 20, 16)
    checks = (
        "test_schema",
        "test_faketensor",
        "test_autograd_registration",
        "test_aot_dispatch_static",
    )
    if shared:
        torch.library.opcheck(operators._local.op, (q, k, v, 5, 2, 0.3), test_utils=checks)
        torch.library.opcheck(operators._linear.op, (q, k, v, None), test_utils=checks)
        own = [x.requires_grad_() for x in (torch.randn(2, 16), torch.randn(2), torch.randn(2))]
        torch.library.opcheck(operators._features.op, (q, k, *own), test_utils=checks)
    else:
        gates = (-torch.rand(1, 2, 20)).requires_grad_()
        torch.library.opcheck(
            operators._linear.op, (q, q.detach().requires_grad_(), v, gates), test_utils=checks
        )
