"""A new token behind a static cache, in Triton's interpreter: sinks, hidden keys and empty slots,
against softmax attention.
"""

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from bayes_router.attention.kernels.triton import launch_decode
from bayes_router.attention.shapes import ExpertShape
from bayes_router.integrations.calls import step
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.layer import RoutedLayer
from bayes_router.integrations.calls.step import seen_and_sinks


@pytest.mark.parametrize("units", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 5])
def test_sinks_and_hidden_keys(units: int, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots after the tokens hold NaN: what is empty is not read."""
    monkeypatch.setattr(launch_decode, "MIN_KEYS", 64)
    torch.manual_seed(units)
    B, H, Hkv, D, S, held, window, sinks = 3, 4, 2, 16, 160, 130, 9, 3
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, Hkv, S, D), torch.randn(B, Hkv, S, D)
    k[:, :, held:], v[:, :, held:] = torch.nan, torch.nan
    route = torch.randint(2, (B, 1, units))
    key = torch.arange(S)
    seen = (key < held)[None].repeat(B, 1)
    seen[1, :padding] = False
    mask = seen[:, None, None]
    visible, end = seen_and_sinks(mask, B, sinks)
    lengths = torch.full((B,), held)
    out = launch_decode.decode_step(
        q, k[:, :, -1:], v[:, :, -1:], q, k[:, :, -1:], k, v, None, route, lengths, (0, -1, 1),
        window, held=True,
        seen=visible, sink_end=end,
    )  # fmt: skip
    near = seen & ((key >= held - window) | (seen.cumsum(-1) <= sinks))  # [B, S]
    local = (route[:, 0] == 1).repeat_interleave(H // units, 1)  # [B, H]
    allowed = torch.where(local[..., None], near[:, None], seen[:, None])[:, :, None]
    k, v = (x.nan_to_num().repeat_interleave(H // Hkv, 1) for x in (k, v))
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k, v, allowed), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("units", [1, 4])
@pytest.mark.parametrize("taken", [None, "full", "local"])
def test_a_layer_without_a_mask_reads_what_the_cache_holds(
    units: int, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all take `full`: its own kernel would see the empty slots."""
    monkeypatch.setattr(launch_decode, "MIN_KEYS", 64)
    torch.manual_seed(units)
    B, H, Hkv, D, S, held, window, sinks = 2, 4, 2, 16, 96, 70, 9, 3
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, Hkv, S, D), torch.randn(B, Hkv, S, D)
    k[:, :, held:], v[:, :, held:] = torch.nan, torch.nan
    layer = RoutedLayer(("full", "local"), ExpertShape(H, D, window), Hkv, sinks, causal=True)
    call = AttentionCall(q, k, v, None, True, own, D**-0.5, plain=True, held=torch.tensor(held))
    route = torch.randint(2, (B, 1, units))
    out = layer.attend(call, route if taken is None else layer.names.index(taken))
    local = route[:, 0] == 1 if taken is None else torch.full((B, 1), taken == "local")
    local = local.repeat_interleave(H // local.shape[1], 1)
    key = torch.arange(S)
    near = (key < held) & ((key >= held - window) | (key < sinks))
    allowed = torch.where(local[..., None], near, key < held)[:, :, None]
    k, v = (x.nan_to_num().repeat_interleave(H // Hkv, 1) for x in (k, v))
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k, v, allowed), rtol=1e-5, atol=1e-5
    )


def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's kernel that needs a mask to hide empty slots."""
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@torch.no_grad()
@pytest.mark.parametrize("unit", ["layer", "head"])
def test_captured_steps_make_no_mask(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand and by the setting, behind a prompt of a bucket; graphs have their stand-in."""
    pytest.importorskip("transformers", minversion="5.0")
    from transformers import StaticCache

    from bayes_router.integrations.huggingface import graphs
    from bayes_router.integrations.patch import routed
    from tests.integrations.graphs_anywhere import install
    from tests.integrations.tiny_models import patched, tokens

    install(monkeypatch)
    monkeypatch.setattr(launch_decode, "MIN_KEYS", 16)
    monkeypatch.setattr(routed.RoutedModel, "steps_in_place", lambda *_: True)
    model, router = patched("llama", experts=("full", "local"), window=5, route_by=unit)
    ids = tokens(2, 60)
    expected = model(ids).logits
    asked = []
    monkeypatch.setattr(step, "seen_and_sinks", lambda *_: asked.append(1))
    hand = graphs.Graphs(model, 80, 2, bucket=16)
    hand.prefill(ids[:, :57])
    router.graphs, cache = True, StaticCache(config=model.config, max_cache_len=70)
    model(ids[:, :57], past_key_values=cache)
    for t in range(57, 60):
        found = hand.step(ids[:, t, None])
        torch.testing.assert_close(found, expected[:, t], rtol=1e-5, atol=1e-5)
        found = model(ids[:, t, None], past_key_values=cache).logits[:, 0]
        torch.testing.assert_close(found, expected[:, t], rtol=1e-5, atol=1e-5)
    assert router.last.replayed and not asked
