"""Sliding-window attention: every token sees the last W tokens, itself included, and the first `sinks`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention import dense_triton
from bayes_router.attention.expert import Expert, ExpertShape, causal_positions, register_expert, repeat_heads, segments
from bayes_router.attention.fused import fused_attention

MIN_BLOCK = 64


@register_expert("local")
class LocalAttention(Expert):
    """softmax(q k^T / sqrt(Dh)) v over the keys n <= t with t - n < W or n < sinks, for the query at position t.

    Banded: O(T (W + sinks)) work and O(T) memory for fixed W. Pretrained decoders park attention on their first tokens; a
    window without these sinks costs them much more (Xiao et al. 2023, arXiv 2309.17453).
    """

    cost_ratio = 0.30

    def __init__(self, shape: ExpertShape):
        super().__init__(shape)
        if shape.window < 1:
            raise ValueError(f"window: expected at least 1 (a token sees itself); got {shape.window}")
        if shape.sinks < 0:
            raise ValueError(f"sinks: expected 0 or more tokens; got {shape.sinks}")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        if not self.shape.sinks and q.shape[2] > self.shape.window and dense_triton.available(q, k, v):
            return dense_triton.local_attention(q, k, v, self.shape.window)
        past = k.shape[2] - q.shape[2]
        pieces = segments(q.shape[2], q.device)
        if len(pieces) > 1:
            parts = [self._attend(q[:, :, a:b], k[:, :, : past + b], v[:, :, : past + b]) for a, b in pieces]
            return torch.cat(parts, 2)
        return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, Tq, Tk = self.shape.window, q.shape[2], k.shape[2]
        older = max(Tk - Tq - window + 1, 0)  # keys before every window
        if window < Tk - older and Tq > MIN_BLOCK:
            return banded(q, k, v, window, self.shape.sinks)
        query, key = causal_positions(Tq, Tk, q.device)
        sinks = min(self.shape.sinks, older)
        k, v, key = (_without(x, sinks, older, dim) for x, dim in ((k, 2), (v, 2), (key, 1)))
        seen = (key <= query) & ((key > query - window) | (key < self.shape.sinks))
        return fused_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])

    def keys_read(self, context: int) -> int:
        """The sinks and the window, or all there are."""
        return min(self.shape.window + self.shape.sinks, context)

    def flops_per_token(self, context: int) -> float:
        """As full attention with min(t, W + sinks) visible keys at position t, counted from 1."""
        most = self.keys_read(context)
        visible = most * (context - (most - 1) / 2) / context
        return 4 * self.shape.num_heads * self.shape.head_dim * visible


def _without(x: Tensor, start: int, stop: int, dim: int) -> Tensor:
    """`x` without start .. stop of a dimension; a view where nothing is before `start`."""
    rest = x.narrow(dim, stop, x.shape[dim] - stop)
    return torch.cat([x.narrow(dim, 0, start), rest], dim) if start else rest


def banded(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int = 0, scale: float | None = None) -> Tensor:
    """Local attention of every query, the last Tq of Tk positions: [B, H, Tq, Dv]. `scale` of the scores: 1 / sqrt(Dh).

    Queries come in blocks of C = max(W, 64); a block sees the sinks and the keys from W - 1 before it to its own end.
    """
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    past, block, sinks = Tk - Tq, max(window, MIN_BLOCK), min(sinks, Tk)
    older = max(past - window + 1, 0)  # keys before every window
    front, back = older + window - 1 - past, -Tq % block  # missing keys before the first query; queries to fill a block
    blocks = F.pad(q, (0, 0, 0, back)).unflatten(2, (-1, block)).transpose(1, 2)  # [B, N, H, C, Dh]
    N = blocks.shape[1]

    def bands(x: Tensor) -> Tensor:  # [B, Hkv, Tk, D] -> [B * N, H, sinks + C + W - 1, D]
        near = F.pad(repeat_heads(x[:, :, older:], H), (0, 0, front, back))
        near = near.unfold(2, block + window - 1, block).permute(0, 2, 1, 4, 3)
        if sinks:
            first = repeat_heads(x[:, :, :sinks], H)[:, None].expand(-1, N, -1, -1, -1)
            near = torch.cat([first, near], 3)
        return near.flatten(0, 1)

    query = past + torch.arange(N * block, device=q.device).view(N, block, 1)
    key = query[:, :1] - (window - 1) + torch.arange(block + window - 1, device=q.device)  # [N, 1, C + W - 1]
    mask = (key <= query) & (key > query - window) & (key >= 0)
    if sinks:  # those in the window are there already
        mask = torch.cat([torch.arange(sinks, device=q.device) <= query - window, mask], -1)
    mask = mask[:, None].repeat(B, 1, 1, 1)  # [B * N, 1, C, sinks + C + W - 1]
    out = fused_attention(blocks.flatten(0, 1), bands(k), bands(v), attn_mask=mask, scale=scale)
    return out.unflatten(0, (B, N)).transpose(1, 2).flatten(2, 3)[:, :, :Tq]
