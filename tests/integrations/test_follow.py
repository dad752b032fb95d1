"""The router follows its model.

Mode, device, dtype (float32 at least), requires_grad where that changes.
"""

from typing import Any

import pytest
import torch

from bayes_router.integrations.patching import patch
from tests.integrations.test_torch_attention import draw, encoder
from tests.integrations.tiny_models import VOCAB, patched, tiny, tokens

TEXT = torch.randint(3, VOCAB, (400,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_half_precision_leaves_the_router_in_float32(cast: str) -> None:
    model, router = patched("llama")
    getattr(model, cast)()
    # no Dirichlet has half precision
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    with torch.no_grad():
        out = router(tokens())
    assert (
        out.concentration.dtype == torch.float32
        and out.logits.dtype == next(model.parameters()).dtype
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "bert"])
def test_double_precision_is_followed(name: str) -> None:
    model, router = patched(name)
    with torch.no_grad():
        before = router(tokens())
        model.double()
        assert {p.dtype for p in router.parameters()} == {torch.float32}  # asking moves nothing
        router.follow()
        assert {p.dtype for p in router.parameters()} == {torch.float64}  # before any pass
        out = router(tokens(), "mean")
        assert out.concentration.dtype == out.logits.dtype == torch.float64
        again = router(tokens())
        same = (again.route == before.route).float().mean()
        assert same > 0.98  # float64 decides ties otherwise
        model.float()
        back = router(tokens())
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    assert torch.equal(back.route, before.route) and torch.equal(back.logits, before.logits)


def test_a_pass_follows_without_being_asked() -> None:
    model, router = patched("llama")
    model.double()
    with torch.no_grad():
        model(tokens())
    assert router.layers[1].experts[1].query_map.dtype == torch.float64
    assert router.controller.layers[1].out.bias.dtype == torch.float64


def test_an_optimiser_made_before_keeps_its_parameters() -> None:
    model, router = patched("llama")
    optimiser = torch.optim.SGD(router.parameters(), lr=0.1)
    model.double()
    router(tokens(), "mean").logits.square().mean().backward()
    before = [p.detach().clone() for p in router.parameters()]
    optimiser.step()
    assert any(not torch.equal(p, q) for p, q in zip(router.parameters(), before, strict=True))


def test_a_model_in_double_precision_is_fitted() -> None:
    router = patch(tiny("llama").double(), window=6, experts=("full", "mapped", "gated", "local"))
    frame = router.fit(TEXT, steps=2, distil_steps=2, context=20, batch_size=2)
    assert frame[["nll", "kl"]].notna().all().all()
    assert abs(router.set_budget(1.0, context=20) - 1) < 0.005


def flags(router: Any) -> set[bool]:
    return {p.requires_grad for p in router.parameters()}


def test_requires_grad_follows_where_it_changes() -> None:
    model = tiny("llama")
    router = patch(model, window=6)
    assert flags(router) == {True}
    model.requires_grad_(False)
    assert flags(router) == {True}  # asking flips nothing
    router.follow()
    assert flags(router) == {False}
    # the router alone is trained: a choice after the model's, so it stands
    router.requires_grad_(True)
    router(tokens(), "mean").logits.square().mean().backward()
    assert flags(router) == {True} and all(p.grad is None for p in model.parameters())
    for flag in (True, False):
        model.requires_grad_(flag)
        router(tokens(), "mean")
    assert not router.controller.layers[0].out.weight.requires_grad  # seen in a pass too
    model.model.layers[1].requires_grad_(True)  # partly frozen: something is trained
    router.follow()
    assert flags(router) == {True}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_fit_leaves_the_flags_as_they_were(frozen: bool) -> None:
    model = tiny("llama")
    model.requires_grad_(not frozen)
    router = patch(model, window=6)
    before = [p.detach().clone() for p in router.parameters()]
    router.fit(TEXT, steps=3, distil_steps=2, context=20, batch_size=2)
    assert any(not torch.equal(p, q) for p, q in zip(router.parameters(), before, strict=True))
    assert flags(router) == {not frozen} == {p.requires_grad for p in model.parameters()}
    module = encoder().requires_grad_(not frozen)
    torch_router = patch(module, window=5)
    torch_router.distil([draw(), draw(seed=2)])
    torch_router.fit([draw(), draw(seed=2)])
    assert flags(torch_router) == {not frozen} == {p.requires_grad for p in module.parameters()}


def test_torch_modules_are_followed() -> None:
    model = encoder().eval()
    router = patch(model, window=5)
    model.double().requires_grad_(False)
    router.follow()
    assert {p.dtype for p in router.parameters()} == {torch.float64} and flags(router) == {False}
    router.force("mapped")
    assert model(draw().double()).dtype == torch.float64
