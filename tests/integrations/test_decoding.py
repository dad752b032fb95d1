"""One new token behind a cache.

It reads what its route needs and no more, and equals the pass without a cache.
"""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_router.integrations.calls.linear import LinearExpert
from bayes_router.integrations.huggingface import growing_cache
from tests.integrations.tiny_models import patched, tokens, transformers

WINDOW, SINKS, T = 6, 2, 30
EXPERTS = ("full", "mapped", "gated", "local")


def choices(rows: int, *taken: str) -> Any:
    """Row b takes taken[b mod n] at every token, in every layer."""
    index = torch.tensor([EXPERTS.index(taken[b % len(taken)]) for b in range(rows)])
    return lambda layer, hidden: index[:, None].expand(hidden.shape[:2])


def behind(model: Any, ids: Tensor, steps: int, **inputs: Any) -> tuple[Any, Tensor]:
    """(cache, logits of the last `steps` tokens decoded one by one)."""
    cache, mask, logits = None, inputs.get("attention_mask"), []
    start, positions = (
        ids.shape[1] - steps,
        torch.empty(0) if mask is None else (mask.cumsum(1) - 1).clamp_min(0),
    )
    for first, last in [(0, start), *((i, i + 1) for i in range(start, ids.shape[1]))]:
        seen = (
            {}
            if mask is None
            else {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
        )
        out = model(ids[:, first:last], past_key_values=cache, use_cache=True, **seen)
        cache = out.past_key_values
        logits.append(out.logits)
    return cache, torch.cat(logits[1:], 1)


def poison(cache: Any, kept: list[int]) -> None:
    """No number in any cached key and value but those at `kept`.

    By `data`, which is how nobody writes to a cache.
    """
    hidden = torch.ones(cache.layers[0].keys.shape[2], dtype=torch.bool)
    hidden[kept] = False
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            x.data[:, :, hidden] = torch.nan


@pytest.mark.parametrize(
    "taken",
    [("local",), ("mapped",), ("gated",), ("local", "mapped"), ("gated", "local", "mapped")],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_rows_on_local_and_linear_touch_no_key_outside_the_window(
    name: str, taken: tuple[str, ...]
) -> None:
    model, router = patched(name, window=WINDOW, sinks=SINKS)
    ids = tokens(3, T)
    with router.routed_by(choices(3, *taken)):
        cache, _ = behind(model, ids, 3)
        expected = model(torch.cat([ids, tokens(3, 1, 7)], 1), use_cache=False).logits[:, -1]
        poison(cache, [*range(SINKS), *range(T - WINDOW + 1, T)])
        got = model(tokens(3, 1, 7), past_key_values=cache, use_cache=True).logits[:, -1]
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_row_on_full_alone_reads_all_keys() -> None:
    model, router = patched("llama", window=WINDOW, sinks=SINKS)
    with router.routed_by(choices(3, "local", "full", "mapped")):
        cache, _ = behind(model, tokens(3, T), 3)
        poison(cache, [*range(SINKS), *range(T - WINDOW + 1, T)])
        got = model(tokens(3, 1, 7), past_key_values=cache, use_cache=True).logits[:, -1]
    assert got.isfinite().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "taken", [("full", "mapped", "gated", "local"), ("mapped",), ("gated",), ("local",)]
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
@torch.no_grad()
def test_decoding_equals_the_pass_without_a_cache(
    name: str, padded: bool, taken: tuple[str, ...]
) -> None:
    model, router = patched(name, window=WINDOW, sinks=SINKS)
    ids, inputs = tokens(4, T), {}
    if padded:
        mask = (torch.arange(T) >= torch.tensor([0, 3, 5, 9])[:, None]).long()
        inputs = {"attention_mask": mask}
    with router.routed_by(choices(4, *taken)):
        _, got = behind(model, ids, 12, **inputs)
        whole = inputs | ({"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if padded else {})
        expected = model(ids, use_cache=False, **whole).logits[:, -12:]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_states_are_used_where_they_are_valid(monkeypatch: Any, padded: bool) -> None:
    model, router = patched("llama", window=WINDOW)
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[1, :4] = 1 - int(padded)
    router.force("mapped")

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("query by key")

    monkeypatch.setattr(LinearExpert, "_weights_by_key", refuse)
    behind(model, tokens(2, T), 8, **({"attention_mask": mask} if padded else {}))
    memory = next(iter(router.memories._by_cache.values()), None)
    assert memory is None or memory[0].running  # the cache is gone, and with it the memory


@pytest.mark.parametrize("change", ["reorder", "crop", "copy", "select", "repeat", "write"])
@pytest.mark.parametrize("expert", ["mapped", "gated"])
@torch.no_grad()
def test_a_changed_cache_makes_its_states_anew(change: str, expert: str) -> None:
    model, router = patched("llama", window=WINDOW, sinks=SINKS)
    ids, more = tokens(3, T), tokens(3, 4, 9)
    with router.routed_by(lambda layer, hidden: choices(len(hidden), expert)(layer, hidden)):
        cache, _ = behind(model, ids, 5)
        if change == "reorder":
            order = torch.tensor([2, 0, 2])
            cache.reorder_cache(order)
            ids = ids[order]
        elif change == "crop":
            cache.crop(-4)
            ids = ids[:, :-4]
        elif change == "copy":
            other = copy.deepcopy(cache)
            model(more[:, :1], past_key_values=cache, use_cache=True)
            cache = other
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
            ids, more = ids[1:2], more[1:2]
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            ids, more = ids.repeat_interleave(2, 0), more.repeat_interleave(2, 0)
        else:
            twin, _ = behind(model, ids.flip(0), 5)
            for layer, theirs in zip(cache.layers, twin.layers, strict=True):
                layer.keys.copy_(theirs.keys)
                layer.values.copy_(theirs.values)
            ids = ids.flip(0)
        for i in range(more.shape[1]):
            got = model(more[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            ids = torch.cat([ids, more[:, i : i + 1]], 1)
            torch.testing.assert_close(
                got, model(ids, use_cache=False).logits[:, -1], atol=2e-5, rtol=1e-4
            )


def test_with_gradients_no_state_is_kept() -> None:
    model, router = patched("llama", window=WINDOW)
    router.force("mapped")
    cache, got = behind(model, tokens(2, T), 2)
    torch.testing.assert_close(
        got, model(tokens(2, T), use_cache=False).logits[:, -2:], atol=2e-5, rtol=1e-4
    )
    got.sum().backward()
    assert all(p.grad is not None for p in router.layers[0].expert(1).parameters())
    assert not router.memories._by_cache[cache][0].running


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sinks", [0, SINKS])
@torch.no_grad()
def test_several_rows_on_cuda_equal_the_pass_without_a_cache(sinks: int) -> None:
    transformers = pytest.importorskip("transformers")
    from bayes_router.integrations.patching import patch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).cuda().eval()
    router = patch(model, window=16, sinks=sinks, experts=EXPERTS)
    ids = tokens(5, 90).cuda()
    index = torch.tensor([0, 1, 2, 3, 0], device="cuda")
    with router.routed_by(lambda layer, hidden: index[:, None].expand(hidden.shape[:2])):
        _, got = behind(model, ids, 6)
        expected = model(ids, use_cache=False).logits[:, -6:]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def stores(cache: Any) -> list[int]:
    return [
        x.untyped_storage().data_ptr() for layer in cache.layers for x in (layer.keys, layer.values)
    ]


@torch.no_grad()
def test_a_step_copies_no_cached_key_and_what_a_cache_showed_stays(monkeypatch: Any) -> None:
    monkeypatch.setattr(growing_cache, "LEAST", 4)
    model, router = patched("llama", window=WINDOW, sinks=SINKS)
    ids = tokens(3, T + 40)
    moved, shown = 0, []
    with router.routed_by(choices(3, "full", "local", "mapped")):
        cache, _ = behind(model, ids[:, :T], 3)
        for i in range(T, T + 40):
            before = stores(cache)
            shown.append(
                [(x, x.clone()) for layer in cache.layers for x in (layer.keys, layer.values)]
            )
            got = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            moved += before != stores(cache)
        expected = model(ids, use_cache=False).logits[:, -1:]
    assert moved <= 8  # room for four tokens more, or an eighth of what there is
    assert all(torch.equal(x, y) for pairs in shown for x, y in pairs)
    assert all(layer.keys.shape[2] == layer.values.shape[2] == T + 40 for layer in cache.layers)
    assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]
)
@torch.no_grad()
def test_two_ends_of_one_text_do_not_write_over_each_other(change: Any) -> None:
    model, router = patched("llama", window=WINDOW, sinks=SINKS)
    ids, ends = tokens(2, T), [tokens(2, 6, seed) for seed in (5, 6)]
    with router.routed_by(choices(2, "full", "local")):
        first, _ = behind(model, ids, 5)
        second = copy.copy(first) if change is copy.copy else change(first)
        if change is copy.copy:  # the same tensors in other layers
            second.layers = [copy.copy(layer) for layer in first.layers]
        for i in range(6):
            got = [
                model(end[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
                for cache, end in zip((first, second), ends, strict=True)
            ]
        for end, logits in zip(ends, got, strict=True):
            expected = model(torch.cat([ids, end], 1), use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def test_a_cache_of_inference_mode_is_carried_on_outside_of_it_and_gradients_are_kept() -> None:
    model, router = patched("llama", window=WINDOW, sinks=SINKS)
    ids = tokens(2, T)
    with router.routed_by(choices(2, "full", "local")):
        with torch.inference_mode():
            cache, _ = behind(model, ids[:, :-4], 5)
        with torch.no_grad():
            for i in range(T - 4, T - 1):
                model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        got = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(
            got, model(ids, use_cache=False).logits[:, -1:], atol=2e-5, rtol=1e-4
        )
        weight = model.model.layers[0].self_attn.k_proj.weight
        cache, steps = behind(model, ids, 4)
        (cached,) = torch.autograd.grad(steps.square().sum(), weight)
        (whole,) = torch.autograd.grad(
            model(ids, use_cache=False).logits[:, -4:].square().sum(), weight
        )
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_long_local_prefill_by_tiles_equals_the_masked_pass(name: str) -> None:
    model, router = patched(name, window=20, sinks=3)
    ids, position = tokens(2, 200), torch.arange(200)
    router.force("local")
    masked = model(ids, attention_mask=(position <= position[:, None]).expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(model(ids).logits, masked, atol=1e-5, rtol=1e-4)
    with torch.enable_grad():
        torch.testing.assert_close(model(ids).logits, masked, atol=1e-5, rtol=1e-4)


def test_a_cache_goes_when_its_text_does() -> None:
    model, router = patched("llama", window=6)
    gc.collect()
    gc.disable()
    try:
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(tokens(1, 12), past_key_values=cache, use_cache=True)
            model(tokens(1, 1), past_key_values=cache, use_cache=True)
        layer = weakref.ref(cache.layers[0])
        copied = pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)
        del cache
        assert layer() is None
    finally:
        gc.enable()
    for one in copied:
        update = one.layers[0].update
        assert update.layer() is one.layers[0]
        router(tokens(1, 1), past_key_values=one, use_cache=True)  # and grows on
        assert one.layers[0].keys.shape[2] == 14
