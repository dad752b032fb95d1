"""Patch PyTorch's own attention.

nn.MultiheadAttention, alone or inside nn.TransformerEncoder and nn.TransformerDecoder.

Weights stay where they are. Self-attention is routed, also where values are another tensor than
queries and keys (DETR adds positions to these alone); a call whose query and key are not one tensor
is cross-attention, runs as before, and is named in a warning. A token on `full` sees what it saw;
where all tokens are, the module's own forward pass is run.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_router.attention.kernels.eager.fused import fused_attention
from bayes_router.attention.shapes import ExpertShape, merge_tokens
from bayes_router.checks import require
from bayes_router.integrations import torch_layer
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.masks import padding_of, seen
from bayes_router.integrations.patch.binding import BINDING, Binding, all_on, replace_forward
from bayes_router.integrations.patch.found import Found
from bayes_router.integrations.patch.settings import RouterConfig
from bayes_router.integrations.torch_model import RoutedTorch


def patch_torch(model: nn.Module, settings: RouterConfig) -> RoutedTorch:
    """Route the self-attention in `model`; see `bayes_router.patch`."""
    modules = _attention(model)
    chosen = range(len(modules)) if settings.layers is None else settings.layers
    require(
        all(0 <= i < len(modules) for i in chosen),
        "layers",
        f"indices of the {len(modules)} layers",
        settings.layers,
    )
    found = []
    for name, module in (modules[i] for i in chosen):
        shape = ExpertShape(module.num_heads, module.head_dim, settings.window)
        found.append(Found(module, name, shape, module.num_heads, module.embed_dim, causal=False))
    router = RoutedTorch(model, found, settings)
    router.bind()
    for one in found:
        router.undo.append(replace_forward(one.module, forward))
        router.undo.append(one.module.register_forward_pre_hook(torch_layer.no_fast_path).remove)
    routed = {one.module for one in found}
    layers = {m for m in model.modules() if torch_layer.fused(m) and m.self_attn in routed}
    for layer in layers:
        router.undo.append(replace_forward(layer, torch_layer.forward))
    for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoder)):
        # takes no nested tensors
        if any(layer not in layers and routed & set(layer.modules()) for layer in encoder.layers):
            router.undo.append(
                partial(setattr, encoder, "use_nested_tensor", encoder.use_nested_tensor)
            )
            encoder.use_nested_tensor = False
    return router


def _attention(model: nn.Module) -> list[tuple[str, nn.MultiheadAttention]]:
    """The self-attention modules by name, in order.

    Raises:
        ValueError: there is none, or one that cannot be routed.
    """
    crossing = {
        m.multihead_attn for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)
    }
    found = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention) and m not in crossing
    ]
    require(
        bool(found),
        "model",
        "a Hugging Face model (transformers 5), nn.TransformerEncoder, nn.TransformerDecoder or "
        "nn.MultiheadAttention",
        type(model).__name__,
        "no attention was found in it",
    )
    for name, m in found:
        where = f"{type(model).__name__}.{name}" if name else type(m).__name__
        require(
            type(m) is nn.MultiheadAttention,
            where,
            "torch.nn.MultiheadAttention",
            type(m).__name__,
            "not served (quantised?)",
        )
        require(
            m._qkv_same_embed_dim,
            where,
            "one size of query, key and value",
            (m.embed_dim, m.kdim, m.vdim),
            "not served",
        )
        require(
            m.bias_k is None and not m.add_zero_attn,
            where,
            "no bias_k and no add_zero_attn",
            "one of them",
            "not served",
        )
        require(
            not m.in_proj_weight.is_meta,
            where,
            "weights in memory",
            "the meta device",
            "load them first",
        )
    return found


def forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Routed self-attention with the arguments of `nn.MultiheadAttention.forward`.

    Raises:
        ValueError: attention weights asked for while tokens are routed: experts have none.
    """
    binding: Binding = getattr(self, BINDING)
    router = binding.router

    def original() -> tuple[Tensor, Tensor | None]:
        return nn.MultiheadAttention.forward(
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )

    if query is not key:
        binding.name_crossing()
        return original()
    x, values = (torch_layer.batched(y, self.batch_first) for y in (query, value))  # [B, T, D]
    route = router.here.decided.pop(binding.index, None)
    if route is None:
        route = router.route(binding.index, x, torch_layer.unhidden(key_padding_mask))
    if not router.observed and all_on(route, router.experts.index("full")):
        return original()
    require(
        not need_weights or router.observed,
        "need_weights",
        "False where tokens are routed (a mixture of experts has no attention weights)",
        True,
        f"{'training mode draws routes: ' if self.training else ''}pass need_weights=False, or "
        f"force('full')",
    )
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal: expected attn_mask beside it, as its hint; got None; pass the causal mask "
            "too"
        )
    call = _call(self, x, values, _merge(key_padding_mask, attn_mask, x, self.num_heads), is_causal)
    out = self.out_proj(merge_tokens(router.execute(binding.index, route, call, x)))  # [B, T, D]
    return (out[0] if query.dim() == 2 else out if self.batch_first else out.transpose(0, 1)), None


def _call(
    module: nn.MultiheadAttention, x: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool
) -> AttentionCall:
    """The attention of x [B, T, D] over itself under a mask as `AttentionCall` has it.

    A causal mask is recognised.
    """
    D, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
    first, last = (None, None) if bias is None else (bias[: 2 * D], bias[2 * D :])
    heads = torch.cat(
        [F.linear(x, weight[: 2 * D], first), F.linear(values, weight[2 * D :], last)], 2
    )
    # [B, H, T, Dh] each
    q, k, v = heads.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    T, dropout = x.shape[1], module.dropout if module.training else 0.0
    causal, padding = False, None
    if mask is not None:
        visible = seen(mask)
        causal = is_causal or not bool(visible.triu(1).any())
        if (
            causal
            and mask.dtype == torch.bool
            and bool(visible.tril().sum() == visible[..., 0, 0].numel() * T * (T + 1) // 2)
        ):
            mask = None  # causal and nothing more
        else:
            padding = padding_of(mask.expand(len(x), -1, -1, -1), T, causal)

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        whole = mask is None and causal and q.shape[2] > 1
        return fused_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=whole)

    return AttentionCall(
        q, k, v, mask, causal, kernel, q.shape[-1] ** -0.5, dropout == 0.0, padding
    )


def _merge(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, x: Tensor, heads: int
) -> Tensor | None:
    """Both masks in one [B or 1, H or 1, T, T].

    Bool (True is seen) where neither weighs, else added to the scores.
    """
    masks: list[Tensor] = []
    if attn_mask is not None:
        masks.append(
            attn_mask.view(-1, heads, *attn_mask.shape[1:])
            if attn_mask.dim() == 3
            else attn_mask[None, None]
        )
    if key_padding_mask is not None:
        padding = key_padding_mask[None] if key_padding_mask.dim() == 1 else key_padding_mask
        masks.append(padding[:, None, None].expand(-1, -1, x.shape[1], -1))
    masks = list(_shown(masks))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return masks[0] if len(masks) == 1 else masks[0] & masks[1]
    added = [
        torch.zeros_like(m, dtype=x.dtype).masked_fill(~m, -torch.inf)
        if m.dtype == torch.bool
        else m.to(x.dtype)
        for m in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _shown(masks: Iterable[Tensor]) -> Iterator[Tensor]:
    """PyTorch's masks with what is only 0 and -inf as bool, True is seen.

    They come as bool (True hides) or float.
    """
    for mask in masks:
        if mask.dtype == torch.bool:
            yield ~mask
        elif bool(((mask == 0) | mask.isneginf()).all()):
            yield mask == 0
        else:
            yield mask
