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


@pytest.mark.parametrize(("outer", "inner"), [(20, 40), (40, 20), (20, 25)])
@torch.no_grad()
def test_another_threads_pass_meanwhile(outer: int, inner: int) -> None:
    """One begins while another is between two layers, with the hooks aside or not."""
    model, router, layers = short()
    texts = [tokens(1, outer), tokens(1, inner)]
    expected = [model(text).logits for text in texts]
    found: list[Any] = []

    def read(text: torch.Tensor) -> None:
        with torch.no_grad():
            logits = model(text).logits
        found.append((logits, len(router.last.executed), router.last.on_full))

    def begin(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=read, args=(texts[1],))
        thread.start()
        thread.join()
        assert hooks(layers) == IN_PLACE

    handle = model.model.layers[0].mlp.register_forward_pre_hook(begin)
    read(texts[0])
    for length, own, (logits, routed, on_full) in zip(
        (inner, outer), expected[::-1], found, strict=True
    ):
        assert torch.equal(logits, own)
        assert (routed, on_full) == ((0, {0, 1}) if length <= 30 else (2, set()))
    assert hooks(layers) == IN_PLACE


@torch.no_grad()
def test_a_short_pass_leaves_the_hooks_of_a_long_one_that_goes_on() -> None:
    model, router, _ = short()
    long, brief = tokens(1, 40), tokens(1, 20)
    expected, found = model(long).logits, list[Any]()
    begun, ended = threading.Event(), threading.Event()

    def read() -> None:
        with torch.no_grad():
            found.append((model(brief), router.last.on_full))

    other = threading.Thread(target=read)

    def wait(*_: Any) -> None:
        if threading.current_thread() is other:
            begun.set()
            ended.wait(60)
        else:
            other.start()
            begun.wait(60)

    model.model.layers[0].mlp.register_forward_pre_hook(wait)
    assert torch.equal(model(long).logits, expected) and len(router.last.executed) == 2
    ended.set()
    other.join()
    assert found[0][1] == {0, 1}


@torch.no_grad()
def test_a_layer_called_by_itself_behind_a_short_pass_is_asked_anew() -> None:
    model, router, layers = short()
    hidden, taken = torch.randn(1, 20, 32), list[int]()
    angles = model.model.rotary_emb(hidden, torch.arange(20)[None])
    model(tokens(1, 20), use_cache=False)
    with router.controller.layers[1].register_forward_hook(lambda *_: taken.append(1)):
        layers[1](hidden, position_embeddings=angles, attention_mask=None)
    assert taken == [1]


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
