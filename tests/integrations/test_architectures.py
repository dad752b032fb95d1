"""Every architecture: exact at full, causal, padding, cached generation, gradients, unpatch."""

from typing import Any

import pytest
import torch

from bayes_router.integrations.patching import patch
from tests.integrations.tiny_models import (
    ALL,
    DECODERS,
    ENCODERS,
    left_padded,
    patched,
    tiny,
    tokens,
)


@pytest.mark.parametrize("name", ALL)
def test_all_tokens_on_full_are_bit_for_bit_the_original(name: str) -> None:
    model, ids = tiny(name), tokens()
    padded, mask, _ = left_padded()
    with torch.no_grad():
        before = model(ids).logits, model(padded, attention_mask=mask).logits, model(ids[:1]).logits
        router = patch(model, window=6)
        router.force("full")
        after = model(ids).logits, model(padded, attention_mask=mask).logits, model(ids[:1]).logits
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_routes_differ_between_tokens_and_reach_every_expert(name: str) -> None:
    _, router = patched(name)
    with torch.no_grad():
        routes = router(tokens(4, 40)).route
    assert set(routes.unique().tolist()) == set(range(len(router.experts)))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("mode", ["hard", "mean"])
def test_no_future_leaks(name: str, mode: str) -> None:
    _, router = patched(name)
    ids = tokens(2, 30)
    other = ids.clone()
    other[:, 20:] = tokens(2, 10, seed=9)
    with torch.no_grad():
        a, b = router(ids, mode), router(other, mode)
    torch.testing.assert_close(a.logits[:, :20], b.logits[:, :20], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        a.concentration[:, :, :20], b.concentration[:, :, :20], atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(a.logits[:, 20:], b.logits[:, 20:], atol=1e-3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(name: str, side: str) -> None:
    model, router = patched(name, sinks=2)
    ids, mask, lengths = left_padded()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    inputs: dict[str, Any] = {"attention_mask": mask}
    if name not in ENCODERS and name not in ("falcon alibi",):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if name in ENCODERS and side == "left":
        pytest.skip("absolute positions of an encoder count padding")
    with torch.no_grad():
        together = router(ids, **inputs)
        for b, length in enumerate(lengths):
            real = mask[b].bool()
            alone = router(ids[b : b + 1, real])
            assert torch.equal(together.route[:, b][:, real], alone.route[:, 0]), (
                f"row {b} of {length}"
            )
            torch.testing.assert_close(
                together.logits[b, real], alone.logits[0], atol=2e-5, rtol=1e-4
            )


@pytest.mark.parametrize("name", DECODERS)
def test_cached_generation_equals_generation_without_cache(name: str) -> None:
    model, _ = patched(name, sinks=1)
    ids, mask, _ = left_padded(3, 20)
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "attention_mask": mask,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with torch.no_grad():
        cached = model.generate(ids, **settings)
        whole = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("name", DECODERS)
def test_stepwise_logits_and_routes_equal_one_pass(name: str) -> None:
    model, router = patched(name)
    ids = tokens(2, 26)
    with torch.no_grad():
        whole = router(ids)
        cache, logits, routes = None, [], []
        for part in ids.split([9, 7, 1, 1, 1, 1, 4, 1, 1], 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
            routes.append(torch.stack([router.last.executed[i] for i in range(len(router.layers))]))
    assert torch.equal(torch.cat(routes, 2), whole.route)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_controllers_experts_and_weights(name: str) -> None:
    model, router = patched(name)
    torch.manual_seed(0)
    model.train()
    out = router(tokens(2, 20), "sample")
    (out.logits.float().square().mean() + 0.1 * out.concentration.sum()).backward()
    missing = [
        key for key, p in router.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not missing
    q = [
        p
        for key, p in model.named_parameters()
        if any(x in key for x in ("q_proj", "c_attn", "query", "qkv"))
    ]
    assert q and all(p.grad is not None and p.grad.abs().sum() > 0 for p in q if p.dim() == 2)


@pytest.mark.parametrize("name", ALL)
def test_unpatch_restores_outputs_and_attributes_exactly(name: str) -> None:
    model, ids = tiny(name), tokens()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    implementation, forwards = (
        model.config._attn_implementation,
        [m.forward.__func__ for m in model.modules()],
    )
    with torch.no_grad():
        before = model(ids).logits
        router = patch(model, window=6)
        router.force("local")
        assert model.state_dict().keys() == state.keys()  # nothing of the patch is the model's
        changed = model(ids).logits
        assert router.unpatch() is model
        assert torch.equal(model(ids).logits, before) and not torch.equal(changed, before)
    assert model.config._attn_implementation == implementation and not router.patched
    assert [m.forward.__func__ for m in model.modules()] == forwards
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
