"""Softmax attention inside a band, in blocks of queries."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.kernels.eager.fused import fused_attention
from bayes_router.attention.kernels.eager.threads import Steps, run
from bayes_router.attention.shapes import repeat_heads

MIN_BLOCK = 64


def banded(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int = 0, scale: float | None = None
) -> Tensor:
    """Local attention of every query, the last Tq of Tk positions: [B, H, Tq, Dv].

    `scale` of the scores: 1 / sqrt(Dh).

    Queries come in blocks of C = max(W, 64); a block sees the sinks and the keys from W - 1 before
    it to its own end.
    """
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    past, block, sinks = Tk - Tq, max(window, MIN_BLOCK), min(sinks, Tk)
    older = max(past - window + 1, 0)  # keys before every window
    # missing keys before the first query; queries to fill a block
    front, back = older + window - 1 - past, -Tq % block
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
    # [N, 1, C + W - 1]
    key = query[:, :1] - (window - 1) + torch.arange(block + window - 1, device=q.device)
    mask = (key <= query) & (key > query - window) & (key >= 0)
    if sinks:  # those in the window are there already
        mask = torch.cat([torch.arange(sinks, device=q.device) <= query - window, mask], -1)
    mask = mask[:, None].repeat(B, 1, 1, 1)  # [B * N, 1, C, sinks + C + W - 1]
    out = fused_attention(blocks.flatten(0, 1), bands(k), bands(v), attn_mask=mask, scale=scale)
    return out.unflatten(0, (B, N)).transpose(1, 2).flatten(2, 3)[:, :, :Tq]


def by_blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`banded` one block of half a window after another, over views of the keys that it sees.

    Nothing is copied and two keys in three are seen, where the blocks of `banded` see one in two;
    the first queries, before which nothing is hidden, are one causal call.
    """
    return run(_blocks(q, k, v, window))


def _blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Steps[Tensor]:
    """Local attention; a mask that is made of more than some elements is shared work, too."""
    (B, H, Tq, _), Dv, past = q.shape, v.shape[3], k.shape[2] - q.shape[2]
    out = q.new_empty(B, Tq, H, Dv).transpose(1, 2)
    # a query of a block sees the keys that stand up to a window before it
    block = window // 2
    ahead = torch.arange(block + window - 1, device=q.device)
    ahead = ahead - torch.arange(block, device=q.device)[:, None]
    mask = q.new_zeros(ahead.shape).masked_fill((ahead < 0) | (ahead >= window), -torch.inf)
    grouped, begun = k.shape[1] != q.shape[1], min(window, Tq) if past == 0 else 0
    if begun:
        first = (x[:, :, :begun] for x in (q, k, v))
        out[:, :, :begun] = fused_attention(*first, is_causal=True, enable_gqa=grouped)
        yield
    for start in range(begun, Tq, block):
        stop, from_key = min(start + block, Tq), past + start - window + 1
        hidden = max(-from_key, 0)
        keys = slice(from_key + hidden, past + stop)
        seen = mask[: stop - start, hidden : stop - start + window - 1]
        out[:, :, start:stop] = fused_attention(
            q[:, :, start:stop], k[:, :, keys], v[:, :, keys], attn_mask=seen, enable_gqa=grouped
        )
        yield
    return out
