"""Sliding-window attention: every token sees the last W tokens, itself included."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention import dense_triton
from bayes_router.attention.expert import Expert, ExpertShape, causal_positions, register_expert, repeat_heads, segments

MIN_BLOCK = 64


@register_expert("local")
class LocalAttention(Expert):
    """softmax(q k^T / sqrt(Dh)) v over positions t - W + 1 .. t. Banded: O(T W) work and O(T) memory for fixed W.

    Queries come in blocks of C = max(W, 64); block n sees the keys from W - 1 before it to its own end.
    """

    cost_ratio = 0.30

    def __init__(self, shape: ExpertShape):
        super().__init__(shape)
        if shape.window < 1:
            raise ValueError(f"window: expected at least 1 (a token sees itself); got {shape.window}")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        if q.shape[2] > self.shape.window and dense_triton.available(q, k, v):
            return dense_triton.local_attention(q, k, v, self.shape.window)
        past = k.shape[2] - q.shape[2]
        pieces = segments(q.shape[2], q.device)
        if len(pieces) > 1:
            parts = [self._attend(q[:, :, a:b], k[:, :, : past + b], v[:, :, : past + b]) for a, b in pieces]
            return torch.cat(parts, 2)
        return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, num_heads = self.shape.window, q.shape[1]
        Tq = q.shape[2]
        k, v = (x[:, :, -(Tq + window - 1) :] for x in (k, v))  # older keys are out of sight
        Tk = k.shape[2]
        if window >= Tk or Tq <= MIN_BLOCK:
            query, key = causal_positions(Tq, Tk, q.device)
            band = (key <= query) & (key > query - window)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=num_heads != k.shape[1])

        block = max(window, MIN_BLOCK)
        front, back = Tq + window - 1 - Tk, -Tq % block  # missing keys before the first query; queries to fill a block
        k, v = (F.pad(x, (0, 0, front, back)) for x in (k, v))
        k, v = (_banded(repeat_heads(x, num_heads), block, window) for x in (k, v))  # [B * N, H, C + W - 1, Dh]
        blocks = F.pad(q, (0, 0, 0, back)).unflatten(2, (-1, block)).transpose(1, 2)  # [B, N, H, C, Dh]
        B, N = blocks.shape[:2]
        mask = _band(block, window, N, front, q.device)  # [N, 1, C, C + W - 1]
        out = F.scaled_dot_product_attention(blocks.flatten(0, 1), k, v, attn_mask=mask.repeat(B, 1, 1, 1))
        return out.unflatten(0, (B, N)).transpose(1, 2).flatten(2, 3)[:, :, :Tq]

    def keys_read(self, context: int) -> int:
        """The window, or all there are."""
        return min(self.shape.window, context)

    def flops_per_token(self, context: int) -> float:
        """As full attention with min(t, W) visible keys at position t."""
        window = min(self.shape.window, context)
        visible = window * (context - (window - 1) / 2) / context
        return 4 * self.shape.num_heads * self.shape.head_dim * visible


def _banded(x: Tensor, block: int, window: int) -> Tensor:
    """[B, H, W - 1 + N C, Dh] -> [B * N, H, C + W - 1, Dh]: what each block of queries may see."""
    return x.unfold(2, block + window - 1, block).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _band(block: int, window: int, num_blocks: int, front: int, device: torch.device) -> Tensor:
    """True where a query of a block sees a key of its band; the first `front` keys of the first block are padding."""
    query = torch.arange(block, device=device)[:, None] + window - 1  # in band coordinates
    key = torch.arange(block + window - 1, device=device)[None]
    band = (key <= query) & (key > query - window)
    start = torch.arange(num_blocks, device=device)[:, None, None, None] * block
    return band & (start + key >= front)
