"""Routed self-attention of nn.MultiheadAttention by its formula.

Every expert dense, every mask written out.
"""

from typing import Any

import torch
from torch import Tensor, nn


def dense_attention(
    module: nn.MultiheadAttention,
    layer: Any,
    x: Tensor,
    route: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    window: int,
    value: Tensor | None = None,
) -> Tensor:
    """x [B, T, D], route int64 [B, T, 1] over full, linear, local.

    `value` [B, T, D] where it is not projected from x.
    """
    B, T, D = x.shape
    H = module.num_heads
    q, k, v = (
        (x @ module.in_proj_weight.T + module.in_proj_bias)
        .view(B, T, 3, H, D // H)
        .permute(2, 0, 3, 1, 4)
    )
    v = v if value is None else value.view(B, T, H, D // H).transpose(1, 2)
    added = torch.zeros(B, H, T, T)
    for mask, shape in ((attn_mask, None), (key_padding_mask, (B, 1, 1, T))):
        if mask is None:
            continue
        shape = shape or ((B, H, T, T) if mask.dim() == 3 else (1, 1, T, T))
        as_float = (
            torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask
        )
        added = added + as_float.view(shape)
    seen = ~added.isneginf()
    offset = torch.arange(T) - torch.arange(T)[:, None]  # key - query
    causal = not bool(seen.triu(1).any())
    near = (
        offset > -window if causal else (offset >= -(window // 2)) & (offset <= (window - 1) // 2)
    )
    scores = q @ k.mT / (D // H) ** 0.5 + added
    full = scores.softmax(-1) @ v
    local = scores.masked_fill(~near, -torch.inf).softmax(-1).nan_to_num(0.0) @ v
    expert, scale = layer.expert(1), (D // H) ** -0.25
    phi_q, phi_k = (
        (q * scale @ expert.query_map.mT).softmax(-1),
        (k * scale @ expert.key_map.mT).softmax(-1),
    )
    weights = phi_q @ phi_k.mT * seen
    linear = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    # [E, B, 1, T, 1]
    choices = nn.functional.one_hot(route[..., 0], 3).float().permute(2, 0, 1)[:, :, None, :, None]
    mixed = sum(w * out for w, out in zip(choices, (full, linear, local), strict=True))
    assert isinstance(mixed, Tensor)
    out: Tensor = module.out_proj(mixed.transpose(1, 2).reshape(B, T, D))
    return out
