"""PyTorch's own attention.

Exact at full in both layouts and modes, masks honoured, cross-attention left alone, refusals.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayes_router.integrations.patching import load_patch, patch
from tests.integrations.dense import dense_attention

D, H, T, B = 32, 4, 20, 3


def encoder(
    batch_first: bool = True, layers: int = 2, seed: int = 0, **settings: Any
) -> nn.TransformerEncoder:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(D, H, 48, dropout=0.0, batch_first=batch_first, **settings)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=batch_first and not settings)


def decoder(seed: int = 0) -> nn.TransformerDecoder:
    torch.manual_seed(seed)
    return nn.TransformerDecoder(
        nn.TransformerDecoderLayer(D, H, 48, dropout=0.0, batch_first=True), 2
    )


def draw(batch_first: bool = True, seed: int = 1) -> Tensor:
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))
    return x if batch_first else x.transpose(0, 1).contiguous()


def scatter(router: Any) -> None:
    torch.manual_seed(3)
    for controller in router.controller.layers:
        nn.init.normal_(controller.hidden.weight, std=0.5)
        nn.init.normal_(controller.out.weight, std=2.0)
        nn.init.zeros_(controller.out.bias)
    for parameter in router.layers.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


PADDING = torch.arange(T) >= torch.tensor([T, T - 4, T - 9])[:, None]  # True hides
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)
ARBITRARY = (torch.rand(T, T, generator=torch.Generator().manual_seed(2)) < 0.3) & ~torch.eye(
    T, dtype=torch.bool
)
WEIGHING = torch.randn(T, T, generator=torch.Generator().manual_seed(4))
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal, not told": {"mask": CAUSAL.isinf()},
    "causal and padding": {"mask": CAUSAL.isinf(), "src_key_padding_mask": PADDING},
    "arbitrary": {"mask": ARBITRARY},
    "weighing": {"mask": WEIGHING},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_full_is_the_original(masks: str, batch_first: bool, train: bool) -> None:
    model, x, named = encoder(batch_first).train(train), draw(batch_first), MASKS[masks]
    if masks == "weighing" and not train and batch_first:
        pytest.skip(
            "the fast path of the original reads a weighing mask as a hiding one and gives no "
            "numbers"
        )
    with torch.no_grad():
        before = model(x, **named)
        router = patch(model, window=5)
        router.force("full")
        after = model(x, **named)
        # the fast path zeroes padding, the other does not
        real = ~PADDING if "padding" in masks else torch.ones_like(PADDING)
        real = real if batch_first else real.T
        torch.testing.assert_close(after[real], before[real], atol=1e-5, rtol=1e-5)
        router.unpatch()
        assert torch.equal(model(x, **named), before)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_routed_layers_equal_the_dense_formula(masks: str, batch_first: bool) -> None:
    """One layer of attention by hand: each token's expert as a dense masked softmax or kernel."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(D, H, batch_first=batch_first).eval()
    router = patch(module, window=5)
    scatter(router)
    x, named = draw(batch_first), dict(MASKS[masks])
    given = {"attn_mask": named.get("mask"), "key_padding_mask": named.get("src_key_padding_mask")}
    with torch.no_grad():
        out = module(x, x, x, need_weights=False, **given)[0]
        route = router.last.executed[0]
    assert len(route.unique()) == 3
    rows = x if batch_first else x.transpose(0, 1)
    expected = dense_attention(
        module,
        router.layers[0],
        rows,
        route,
        given["attn_mask"],
        given["key_padding_mask"],
        window=5,
    )
    real = ~PADDING if "padding" in masks else torch.ones_like(PADDING)
    torch.testing.assert_close(
        (out if batch_first else out.transpose(0, 1))[real], expected[real], atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_changes_no_real_token(batch_first: bool) -> None:
    model = encoder(batch_first).eval()
    router = patch(model, window=5)
    scatter(router)
    x = draw(batch_first)
    with torch.no_grad():
        together = model(x, src_key_padding_mask=PADDING)
        for b in range(B):
            real = ~PADDING[b]
            alone = model(x[b : b + 1, real] if batch_first else x[real, b : b + 1])
            mine = together[b, real] if batch_first else together[real, b]
            torch.testing.assert_close(
                mine, alone[0] if batch_first else alone[:, 0], atol=1e-5, rtol=1e-4
            )


def test_causal_masks_let_no_future_through() -> None:
    model = encoder().eval()
    scatter(patch(model, window=5))
    x = draw()
    other = x.clone()
    other[:, 12:] = draw(seed=5)[:, 12:]
    with torch.no_grad():
        a, b = (model(y, mask=CAUSAL, is_causal=True) for y in (x, other))
    torch.testing.assert_close(a[:, :12], b[:, :12], atol=1e-5, rtol=1e-5)


def test_decoder_routes_self_attention_and_leaves_cross_attention_alone() -> None:
    model, x, memory = decoder().eval(), draw(), draw(seed=8)
    with torch.no_grad():
        before = model(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)
        router = patch(model, window=5)
        assert [one.name for one in router.found] == ["layers.0.self_attn", "layers.1.self_attn"]
        torch.testing.assert_close(
            model(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True), before, atol=1e-6, rtol=1e-6
        )
        router.force("local")
        changed = model(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)
        # memory is read
        assert not torch.allclose(
            changed, model(x, memory * 2, tgt_mask=CAUSAL, tgt_is_causal=True)
        )
        # a window of 5 hides nothing yet
        torch.testing.assert_close(changed[:, :5], before[:, :5], atol=1e-5, rtol=1e-5)
        router.unpatch()
        assert torch.equal(model(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True), before)


def test_bare_module_gives_weights_on_full_and_refuses_them_routed() -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(D, H, batch_first=True).eval(), draw()
    with torch.no_grad():
        before = module(x, x, x)
        router = patch(module, window=5)
        after = module(x, x, x)
        assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
        unbatched = module(x[0], x[0], x[0], need_weights=False)[0]
        torch.testing.assert_close(unbatched, before[0][0], atol=1e-6, rtol=1e-5)
        memory = draw(seed=8)
        router.force("local")
        module(x, memory, memory)  # cross-attention: weights as ever
        with pytest.raises(ValueError, match="need_weights"):
            module(x, x, x)


def test_masks_of_single_heads_are_exact() -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(D, H, batch_first=True).eval(), draw()
    per_head = (
        torch.rand(B * H, T, T, generator=torch.Generator().manual_seed(6)) < 0.3
    ) & ~torch.eye(T, dtype=torch.bool)
    router = patch(module, window=5)
    scatter(router)
    with torch.no_grad():
        out = module(x, x, x, need_weights=False, attn_mask=per_head)[0]
    expected = dense_attention(
        module, router.layers[0], x, router.last.executed[0], per_head, None, window=5
    )
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


def test_gradients_and_fit() -> None:
    model = encoder().train()
    router = patch(model, window=5)
    scatter(router)
    (model(draw()).square().mean() + 0.01 * router.kl()).backward()
    assert not [
        name
        for name, p in router.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad(), router.zero_grad()
    errors = router.distil([draw(seed=s % 3) for s in range(40)], lr=0.01)
    assert errors[-1] < errors[0]
    before = [p.clone() for p in model.parameters()]
    losses = router.fit([draw(seed=s % 3) for s in range(10)])
    assert len(losses) == 10 and all(
        torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)
    )
    assert all(p.requires_grad for p in model.parameters()) and model.training


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_stands_at_padding_teaches_nothing(batch_first: bool) -> None:
    """Neither distillation nor the default loss of a fit reads it, whatever it is."""
    hidden = torch.arange(20) >= torch.tensor([20, 12, 7])[:, None]
    rows = hidden if batch_first else hidden.T
    losses = []
    for scale in (0.0, 50.0):
        router = patch(
            encoder(batch_first=batch_first), window=5, experts=("full", "mapped", "local")
        )
        x = torch.where(rows[..., None], scale * draw(batch_first, seed=9), draw(batch_first))
        torch.manual_seed(0)
        inputs = [(x, None, hidden)] * 3
        losses.append(router.distil(inputs, lr=0.01) + router.fit(inputs[:1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_attention_module_alone_is_fitted_on_its_output() -> None:
    module = nn.MultiheadAttention(D, H, batch_first=True)
    router = patch(module, window=5)
    x = draw()
    losses = router.fit([(x, x, x, None, False)] * 3)
    assert all(0 < loss < 1 for loss in losses)


def test_save_and_load(tmp_path: Any) -> None:
    model, x = encoder().eval(), draw()
    router = patch(model, window=5)
    scatter(router)
    with torch.no_grad():
        routed = model(x)
        router.save(tmp_path)
        router.unpatch()
        load_patch(model, tmp_path)
        assert torch.equal(model(x), routed)
    with pytest.raises(ValueError, match="was made for"):
        load_patch(encoder(seed=1), tmp_path)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(2, 2), "no attention was found"),
        (nn.MultiheadAttention(D, H, kdim=8), "one size"),
        (nn.MultiheadAttention(D, H, add_bias_kv=True), "bias_k"),
        (nn.MultiheadAttention(D, H, device="meta"), "meta"),
    ],
)
def test_refusals(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch(module)
    with pytest.raises(ValueError, match="gated"):
        patch(encoder(), experts=("full", "gated"))


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal and padding"])
@torch.no_grad()
def test_unfitted_it_is_the_fused_original_bit_for_bit(
    masks: str, settings: dict[str, Any]
) -> None:
    model, x = encoder(**settings).eval(), draw()
    before = model(x, **MASKS[masks])
    router = patch(model, window=5)
    assert torch.equal(model(x, **MASKS[masks]), before)  # by its controllers
    router.force("full")
    assert torch.equal(model(x, **MASKS[masks]), before)


@torch.no_grad()
def test_padding_comes_out_as_the_originals_zeros_where_tokens_are_routed() -> None:
    model, x = encoder().eval(), draw()
    before = model(x, src_key_padding_mask=PADDING)
    router = patch(model, window=5)
    scatter(router)
    routed = model(x, src_key_padding_mask=PADDING)
    assert not before[PADDING].any() and not routed[PADDING].any()
    assert not torch.allclose(routed[~PADDING], before[~PADDING], atol=1e-3)
    for b, length in enumerate((~PADDING).sum(1).tolist()):
        torch.testing.assert_close(
            routed[b, :length], model(x[b : b + 1, :length])[0], atol=1e-5, rtol=1e-4
        )
    router.unpatch()
    assert torch.equal(model(x, src_key_padding_mask=PADDING), before)


@torch.no_grad()
def test_hooks_of_ones_own_run_as_without_a_patch() -> None:
    model, x, seen = encoder().eval(), draw(), []
    patch(model, window=5)
    model.layers[0].linear1.register_forward_hook(lambda *_: seen.append("linear1"))
    model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append("self_attn"))
    model(x)
    assert seen == ["self_attn", "linear1"]


@pytest.mark.parametrize("padded", [True, False])
def test_a_causal_hint_without_its_mask_is_refused_as_the_original_refuses(padded: bool) -> None:
    hidden = PADDING if padded else None
    for module in (encoder().train(), encoder()):
        bare = nn.MultiheadAttention(D, H, batch_first=True).train(module.training)
        x = draw()
        for patched in (False, True):
            if patched:
                routers = [patch(module, window=5), patch(bare, window=5)]
                for router in routers:
                    scatter(router)
            with pytest.raises(RuntimeError, match="is_causal"):
                module(x, is_causal=True, src_key_padding_mask=hidden)
            with pytest.raises(RuntimeError, match="is_causal"):
                bare(x, x, x, is_causal=True, key_padding_mask=hidden, need_weights=False)
    module.eval()
    # the fused original would see the future
    with torch.no_grad(), pytest.raises(RuntimeError, match="is_causal"):
        module(x, is_causal=True, src_key_padding_mask=hidden)
