"""Generation by the ordinary API of a patched model.

Every route mix, beams, sampling, assisted prefixes, packed text.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_router.integrations.calls.layer import RoutedLayer
from bayes_router.integrations.calls.softmax import LocalExpert
from bayes_router.routing.policy import Budget
from tests.integrations.tiny_models import VOCAB, left_padded, patched, tokens

MIXES = {
    "scattered": None,
    "full": "full",
    "local": "local",
    "mapped": "mapped",
    "gated": "gated",
    "thrifty": Budget((1.0, 0.15, 0.15, 0.3), 3.0),
}
GREEDY: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def routed_llama(mix: str, **settings: Any) -> Any:
    model, router = patched("llama", **settings)
    if isinstance(MIXES[mix], str):
        router.force(MIXES[mix])
    elif MIXES[mix] is not None:
        router.policy = MIXES[mix]
    return model


def greedy_by_hand(model: Any, ids: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_greedy_with_cache_equals_greedy_by_hand(mix: str) -> None:
    model, ids = routed_llama(mix), tokens(2, 18)
    assert torch.equal(model.generate(ids, **GREEDY), greedy_by_hand(model, ids, 12))


@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_left_padded_batches_generate_as_each_prompt_alone(mix: str) -> None:
    model = routed_llama(mix, sinks=2)
    ids, mask, lengths = left_padded(3, 20)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for b in range(len(lengths)):
        alone = model.generate(ids[b : b + 1, mask[b].bool()], **GREEDY)
        assert torch.equal(together[b, -12:], alone[0, -12:])


@torch.no_grad()
def test_beams_sampling_and_assisted_prefixes_equal_those_without_cache() -> None:
    model, ids = routed_llama("scattered"), tokens(1, 20).repeat(1, 2)
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    draws = {**GREEDY, "do_sample": True, "top_k": 20}
    torch.manual_seed(0)
    with_cache = model.generate(ids, **draws)
    torch.manual_seed(0)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **draws))
    assert torch.equal(
        model.generate(ids, prompt_lookup_num_tokens=4, **GREEDY), model.generate(ids, **GREEDY)
    )
    prefix = model(ids[:, :30], use_cache=True).past_key_values
    assert torch.equal(
        model.generate(ids, past_key_values=prefix, **GREEDY), model.generate(ids, **GREEDY)
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "falcon"])
@torch.no_grad()
def test_a_static_cache_gives_what_a_growing_one_gives(name: str) -> None:
    model, router = patched(name, sinks=1)
    ids, mask, _ = left_padded(2, 18)
    asked = {
        **GREEDY,
        "attention_mask": mask,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    grown, still = (
        model.generate(ids, **asked, **more) for more in ({}, {"cache_implementation": "static"})
    )
    assert torch.equal(still.sequences, grown.sequences)
    torch.testing.assert_close(
        torch.stack(still.logits), torch.stack(grown.logits), atol=1e-5, rtol=1e-4
    )
    router.force("full")
    full = model.generate(ids, **asked, cache_implementation="static")
    router.unpatch()
    plain = model.generate(ids, **asked, cache_implementation="static")
    assert torch.equal(torch.stack(full.logits), torch.stack(plain.logits))


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    model, router = patched("llama", sinks=2)
    first, second = tokens(1, 13), tokens(1, 17, seed=5)
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    packed = router(torch.cat([first, second], 1), position_ids=positions, use_cache=False)
    for part, rows in ((first, slice(0, 13)), (second, slice(13, 30))):
        alone = router(part)
        assert torch.equal(packed.route[:, :, rows], alone.route)
        torch.testing.assert_close(packed.logits[:, rows], alone.logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_local_is_full_attention_under_a_window_and_sinks_add_the_first_tokens() -> None:
    model, router = patched("gpt2", window=6, sinks=2, layers=(0,))
    ids = tokens(1, 30)
    query, key = torch.arange(30)[:, None], torch.arange(30)
    router.force("local")
    routed = model(ids).logits
    band = (key <= query) & ((key > query - 6) | (key < 2))
    router.unpatch()
    attention = model.transformer.h[0].attn
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": band[None, None]}),
        with_kwargs=True,
    )
    torch.testing.assert_close(routed, model(ids).logits, atol=1e-5, rtol=1e-4)
    handle.remove()


@torch.no_grad()
def test_long_prefill_by_the_dispatcher_equals_the_masked_path() -> None:
    model, router = patched("llama", window=20, sinks=3)
    ids = tokens(2, 200)
    fast = router(ids)
    position = torch.arange(200)
    causal = (position <= position[:, None]).expand(2, 1, -1, -1)
    masked = router(ids, attention_mask=causal)
    assert torch.equal(fast.route, masked.route) and fast.logits.shape == (2, 200, VOCAB)
    torch.testing.assert_close(fast.logits, masked.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_prefill_computes_local_rows_alone_and_equals_the_masked_path(
    name: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, router = patched(name, window=7, sinks=3, experts=("full", "local"))
    ids, mask = tokens(3, 200), torch.ones(3, 200, dtype=torch.int64)
    for row, missing in ((1, 50), (2, 191)):
        mask[row, slice(0, missing) if side == "left" else slice(200 - missing, 200)] = 0
    with monkeypatch.context() as patch:
        patch.setattr(LocalExpert, "forward", lambda *_: pytest.fail("every row computed"))
        fast = router(ids, attention_mask=mask)
    monkeypatch.setattr(RoutedLayer, "_dispatchable", lambda *_: False)
    masked, real = router(ids, attention_mask=mask), mask.bool()
    assert torch.equal(fast.route[:, real], masked.route[:, real])
    torch.testing.assert_close(fast.logits[real], masked.logits[real], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_inside_a_cache_is_read_alike_with_and_without_it() -> None:
    model, router = patched("llama", experts=("full", "mapped", "gated", "local"))
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 9:14] = 0  # a short prompt padded on the right, then more of its text
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = router(ids, attention_mask=mask, position_ids=positions)
    cache, logits = None, []
    for start, end in ((0, 14), (14, 17), (17, 18), (18, 19), (19, 20)):
        part = slice(start, end)
        out = model(
            ids[:, part],
            attention_mask=mask[:, :end],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], whole.logits[real], atol=1e-5, rtol=1e-4)
