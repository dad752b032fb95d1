"""A patched model under torch.compile: one graph, and what it computes outside."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from bayes_router.integrations.calls.layer import RoutedLayer
from bayes_router.integrations.huggingface import registered
from bayes_router.routing.policy import Conservative
from bayes_router.types import RoutingMode
from tests.integrations.tiny_models import left_padded, patched, tokens

NAMES = ["llama", "mistral"]


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: Any) -> Any:
    """Compiled, and an error where the graph breaks."""
    return torch.compile(model, backend="eager", fullgraph=True, dynamic=False)


def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The masks of the calls that are answered from now on."""
    seen: list[Tensor | None] = []
    attend = RoutedLayer.attend

    def watched(self: RoutedLayer, call: Any, route: Any) -> Tensor:
        seen.append(call.mask)
        return attend(self, call, route)

    monkeypatch.setattr(RoutedLayer, "attend", watched)
    return seen


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_graph_routes_as_the_model_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, router = patched(name, sinks=1)
    ids = tokens(2, 30)
    expected = model(ids, use_cache=False).logits
    routes = dict(router.last.executed)
    assert all(
        0 < float(route.float().mean()) < len(router.experts) - 1 for route in routes.values()
    )
    seen = masks(monkeypatch)
    found = whole(model)(ids, use_cache=False).logits
    assert torch.equal(found, expected)
    assert all(torch.equal(router.last.executed[i], route) for i, route in routes.items())
    del seen[:]
    found = whole(model)(ids).logits  # into a new cache: nobody asks for packed texts then
    assert torch.equal(found, expected)
    if name == "llama":  # the layers of the other slide
        assert seen == [None] * len(router.layers)


@torch.no_grad()
def test_padding_and_caches_are_read_in_one_graph() -> None:
    model, router = patched("llama", sinks=1)
    ids, mask, _ = left_padded(2, 18)
    expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    compiled = whole(model)
    found = compiled(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert torch.equal(found, expected)
    both = []
    for run in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=24)
        model(ids, past_key_values=cache)  # as generate does, which compiles steps alone
        steps = [run(ids[:, t, None], past_key_values=cache).logits for t in range(3)]
        both.append(torch.stack(steps))
    assert torch.equal(*both)
    assert len(router.last.executed) == len(router.layers)


@torch.no_grad()
def test_a_compiled_copy_routes_by_its_own_controllers() -> None:
    model, router = patched("llama", sinks=1)
    twin = copy.deepcopy(model)
    ids = tokens(2, 30)
    first = model(ids, use_cache=False).logits
    router.force("full")  # the original alone
    assert torch.equal(whole(twin)(ids, use_cache=False).logits, first)
    assert not torch.equal(model(ids, use_cache=False).logits, first)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llama", RoutingMode.HARD),
        ("gemma3", RoutingMode.HARD),
        ("falcon", RoutingMode.MEAN),
    ],
)
def test_one_graph_has_the_gradients_of_the_model(name: str, mode: RoutingMode) -> None:
    """Padded, with one layer that slides, and of an architecture with an attention of its own."""
    model, router = patched(name, route_by="head", experts=("full", "mapped", "local"), sinks=1)
    router.mode = mode
    if name == "llama":
        router.policy = Conservative(tuple(router.cost_ratio.tolist()), threshold=0.9)
    ids, mask, _ = left_padded(2, 18)
    found = []
    for run in (model, whole(model)):
        router.zero_grad()
        model.zero_grad()
        logits = run(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.logsumexp(-1).sum().backward()
        added = [p.grad for p in router.parameters() if p.grad is not None]
        found.append([logits.detach(), model.get_input_embeddings().weight.grad, *added])
    plain, compiled = found
    assert len(plain) == len(compiled) >= 6 and all(bool(x.any()) for x in plain[:3])
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    if mode is RoutingMode.HARD:
        assert any(bool((route != 0).any()) for route in router.last.executed.values())


@torch.no_grad()
def test_an_architecture_with_an_attention_of_its_own_is_one_graph_too() -> None:
    model, _ = patched("falcon", route_by="head", sinks=1)
    ids = tokens(2, 30)
    expected = model(ids, use_cache=False).logits
    assert torch.equal(whole(model)(ids, use_cache=False).logits, expected)


def test_no_mask_is_written_out_where_it_says_no_more_than_causal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registered, "traced", lambda: True)
    asked = {"batch_size": 1, "q_length": 5, "kv_length": 5, "allow_is_causal_skip": False}
    assert registered.compiled_mask("sdpa", **asked) is None
    padding = torch.tensor([[False, True, True, True, True]])
    for more in ({"attention_mask": padding}, {"kv_length": 7}, {"q_offset": torch.tensor(0)}):
        assert registered.compiled_mask("sdpa", **{**asked, **more}) is not None
    monkeypatch.setattr(registered, "traced", lambda: False)
    assert registered.compiled_mask("sdpa", **asked) is not None
