"""Experts whose past is a sum: what a token adds to the state, and the state after many."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.experts.gated import GatedLinearAttention
from bayes_router.attention.experts.linear import LinearAttention
from bayes_router.attention.experts.mapped import MappedGatedAttention
from bayes_router.attention.kernels.eager.chunks import feature_map, with_ones
from bayes_router.attention.shapes import repeat_heads, segments, widen

SUMS = (LinearAttention, GatedLinearAttention, MappedGatedAttention)
"""Experts whose state is a sum of phi(k) v^T, which may fade."""


def advance(expert: Expert, k: Tensor, v: Tensor, state: Tensor, real: Tensor | None) -> Tensor:
    """The state after the tokens k, v [B, Hkv, T, Dh] that are `real` [B, T]: nothing is computed of each token's own."""
    for a, b in segments(k.shape[2], k.device):
        phi_k, value, rest = entries(expert, k[:, :, a:b], v[:, :, a:b])
        if real is not None:
            mask = real[:, None, a:b, None]
            phi_k, value = torch.where(mask, phi_k, 0.0), torch.where(mask, value, 0.0)
        if rest is not None:
            rest = rest if real is None else torch.where(real[:, None, a:b], rest, 0.0)
            since = rest.flip(-1).cumsum(-1).flip(-1)  # [B, H, T], log of what is kept from before a token to the end
            state = since[..., :1, None].exp() * state
            phi_k = phi_k * F.pad(since[..., 1:], (0, 1)).exp().unsqueeze(-1)
        state = state + phi_k.transpose(-1, -2) @ value
    return state


def entries(expert: Expert, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features [B, Hs, T, Dh], values with ones [B, Hs, T, Dh + 1], and log gates, if any; of the state's heads Hs."""
    if isinstance(expert, GatedLinearAttention):
        k, v = (repeat_heads(x, expert.shape.num_heads) for x in (k, v))
        return expert.feature(k), with_ones(widen(v)), expert.log_gate(k)
    return feature_map(widen(k)), with_ones(widen(v)), None
