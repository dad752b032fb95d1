"""One new token for each row of a batch, each with its own expert and its own length: only what a row sees is read."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.expert import Expert
from bayes_router.attention.full import FullAttention
from bayes_router.attention.local import LocalAttention
from bayes_router.attention.problem import RoutedProblem


def attend_one(held: RoutedProblem) -> Tensor:
    """[B, H, 1, Dh]: row b sees keys 0..starts[b], its own included; rows of experts `elsewhere` are zero."""
    if held.q.device.type == "cuda" and all(_reach(expert) is not None for _, expert in held.computed()):
        return _masked(held)
    return _grouped(held)


def _grouped(held: RoutedProblem) -> Tensor:
    """Rows with the same expert and the same number of keys in one call, on views of the store (no keys copied)."""
    assert held.starts is not None
    out = torch.zeros_like(held.q)
    taken, lengths = held.route[:, 0].tolist(), (held.starts + 1).tolist()
    if len(set(taken)) == 1 and len(set(lengths)) == 1:
        rows = [slice(0, len(taken))]
    else:
        rows = [slice(b, b + 1) for b in range(len(taken))]
    for row in rows:
        index, length = taken[row.start], lengths[row.start]
        if index in held.elsewhere:
            continue
        expert = held.experts[index]
        reach = _reach(expert)
        first = 0 if reach is None else max(length - reach, 0)
        q, k, v = held.inputs(expert)
        q, k, v = q[row], k[row, :, first:length], v[row, :, first:length]
        out[row] = expert(q, k, v) if reach is None else _softmax(q, k, v)
    return out


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One query over all the keys given; queries that share a key head packed, [B, H, 1, Dh] -> [B, Hkv, G, Dh]."""
    packed = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
    return F.scaled_dot_product_attention(packed, k, v, attn_mask=mask).flatten(1, 2).unsqueeze(2)


def _masked(held: RoutedProblem) -> Tensor:
    """Static shapes and no synchronisation, at the price of reading every slot: for a CUDA device without Triton."""
    assert held.starts is not None
    slots = torch.arange(held.k.shape[2], device=held.q.device)  # [S]
    last = held.starts[:, None]
    seen = torch.zeros(1, 1, dtype=torch.bool, device=held.q.device)
    for index, expert in held.computed():
        first = last - (_reach(expert) or 0) + 1
        seen = seen | ((held.route == index) & (slots <= last) & (slots >= first))  # [B, S]
    computed = seen.any(-1)[:, None, None, None]
    mask = (seen | ~seen.any(-1, keepdim=True))[:, None, None]  # a row without keys would divide by zero
    return torch.where(computed, _softmax(held.q, held.k, held.v, mask), 0.0)


def _reach(expert: Expert) -> int | None:
    """How many keys back a softmax expert sees, itself included; None where only the expert itself knows."""
    if type(expert) is FullAttention:
        return 1 << 40
    return expert.shape.window if type(expert) is LocalAttention else None
