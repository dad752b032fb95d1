"""A patch stands aside while a short text, which is left alone, goes through its model."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

from bayes_router.integrations.patch import routed as routed_module
from tests.integrations.tiny_models import patched, tokens

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are left alone on a CPU, too."""
    monkeypatch.setattr(routed_module, "takes_full", lambda x, T, names, most: 1 < T <= most)


def short() -> tuple[Any, Any, list[nn.Module]]:
    model, router = patched("llama", experts=("full", "local"), window=5)
    router.full_up_to = 30
    return model, router, [layer.self_attn for layer in model.model.layers]


def hooks(layers: list[nn.Module]) -> list[tuple[int, int]]:
    return [(len(x._forward_pre_hooks), len(x._forward_hooks)) for x in layers]


def seen_inside(model: Any, layers: list[nn.Module]) -> list[Any]:
    """Hooks, and the name of the attention function, as the second layer's feed-forward runs."""
    seen: list[Any] = []
    model.model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: seen.append((hooks(layers), model.config._attn_implementation))
    )
    return seen


IN_PLACE, ASIDE = [(1, 1), (1, 1)], [(1, 1), (0, 0)]


@torch.no_grad()
def test_hooks_are_off_a_short_pass_and_back_behind_it() -> None:
    model, router, layers = short()
    seen, name = seen_inside(model, layers), model.config._attn_implementation
    ids = tokens(2, 20)
    found = model(ids)
    assert seen == [(ASIDE, "sdpa")] and router.last.on_full == {0, 1}
    assert hooks(layers) == IN_PLACE and model.config._attn_implementation == name
    model(ids[:, :3], past_key_values=found.past_key_values)
    model(tokens(1, 31))
    assert seen[1:] == [(IN_PLACE, name)] * 2 and len(router.last.executed) == 2
    router.unpatch()
    assert torch.equal(found.logits, model(ids).logits)


@torch.no_grad()
def test_whatever_ends_a_pass_they_are_back() -> None:
    model, router, layers = short()
    name, ids = model.config._attn_implementation, tokens(1, 20)
    ends: list[BaseException] = [RuntimeError("stopped"), KeyboardInterrupt()]
    for end in ends:

        def stop(*_: Any, end: BaseException = end) -> None:
            raise end

        handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
        with pytest.raises(type(end)):
            model(ids)
        handle.remove()
        if isinstance(end, RuntimeError):  # no hook hears of the other, and the next pass mends it
            assert hooks(layers) == IN_PLACE and model.config._attn_implementation == name
        model(tokens(1, 31))
        assert len(router.last.executed) == 2 and hooks(layers) == IN_PLACE
        assert model.config._attn_implementation == name


@torch.no_grad()
def test_a_layer_with_a_hook_of_others_keeps_all() -> None:
    model, router, layers = short()
    ids, heard = tokens(1, 20), []
    seen, expected = seen_inside(model, layers), model(ids).logits
    handle = layers[1].register_forward_hook(lambda *_: heard.append(1))
    assert torch.equal(model(ids).logits, expected)
    assert [len(before) for before in (heard, seen)] == [1, 2] and router.last.on_full == {0, 1}
    assert seen[1][0] == [(1, 1), (1, 2)]
    handle.remove()
    model(ids)
    assert seen[2] == (ASIDE, "sdpa")


@torch.no_grad()
def test_another_threads_pass_is_routed_meanwhile() -> None:
    """A long text begins while a short one has the hooks aside, and the short one goes on."""
    model, router, layers = short()
    long, brief = tokens(1, 40), tokens(1, 20)
    expected, own = model(long).logits, model(brief).logits
    found: list[Any] = []

    def other() -> None:
        with torch.no_grad():
            found.append((model(long).logits, len(router.last.executed)))

    def begin(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        found.append(hooks(layers))

    handle = model.model.layers[0].mlp.register_forward_pre_hook(begin)
    assert torch.equal(model(brief).logits, own)
    assert found[1] == IN_PLACE and found[0][1] == 2
    assert torch.equal(found[0][0], expected) and router.last.on_full == {0, 1}
    assert hooks(layers) == IN_PLACE


@torch.no_grad()
def test_a_model_that_is_copied_or_unpatched_meanwhile_is_whole() -> None:
    model, router, layers = short()
    ids, long, copies = tokens(1, 20), tokens(1, 31), list[Any]()
    expected, inside = model(long).logits, model.model.layers[1].mlp

    def take(*_: Any) -> None:
        copies.append(copy.deepcopy(model))

    with inside.register_forward_pre_hook(take):
        model(ids)
    twin = copies[0]
    twin.model.layers[1].mlp._forward_pre_hooks.clear()
    assert torch.equal(twin(long).logits, expected)
    assert hooks([layer.self_attn for layer in twin.model.layers]) == IN_PLACE

    def end(*_: Any) -> None:
        router.unpatch()

    with inside.register_forward_pre_hook(end):
        model(ids)
    assert hooks(layers) == [(0, 0), (0, 0)] and model.config._attn_implementation == "sdpa"
