"""One new token for each row of a batch, each with its own experts and its own length.

Only what a row sees is read.

On CUDA `decode` does that; this is what serves the CPU, and CUDA where no kernel can: without
Triton, in float64, for head sizes beyond 256, or with an expert of the user's that looks at keys.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.shapes import unit_heads


def attend_one(held: RoutedProblem, slots: int, ring: bool) -> Tensor:
    """[B, H, 1, Dh]: row b sees keys 0..starts[b], its own included.

    Rows of experts `elsewhere` are zero.

    The first `slots` slots of the store count; in a ring position p is in slot p mod slots. On
    CUDA, full and local experts wait for nothing, but every slot is read; with any other expert the
    choices and lengths are read on the host.
    """
    if held.q.device.type == "cuda" and all(expert.kernel.softmax for _, expert in held.computed()):
        return _masked(held, slots, ring)
    return _grouped(held, slots)


def _grouped(held: RoutedProblem, slots: int) -> Tensor:
    """Rows and units with the same expert and the same number of keys in one call.

    They are views of the store; few are copied.
    """
    assert held.starts is not None
    out = torch.zeros_like(held.q)
    taken, lengths = held.route[:, 0].tolist(), (held.starts + 1).tolist()  # [B][R], [B]
    heads = unit_heads(held.units, held.q.shape[1], held.k.shape[1])
    if len({choice for row in taken for choice in row}) == 1 and len(set(lengths)) == 1:
        _fill(out, held, slice(0, len(taken)), WHOLE, taken[0][0], lengths[0], slots)
        return out
    for b, (row, length) in enumerate(zip(taken, lengths, strict=True)):
        if len(set(row)) == 1:
            _fill(out, held, slice(b, b + 1), WHOLE, row[0], length, slots)
            continue
        for unit, index in zip(heads, row, strict=True):
            _fill(out, held, slice(b, b + 1), unit, index, length, slots)
    return out


WHOLE = slice(None), slice(None)


def _fill(
    out: Tensor,
    held: RoutedProblem,
    row: slice,
    heads: tuple[slice, slice],
    index: int,
    length: int,
    slots: int,
) -> None:
    """Write the output of one expert into rows that hold `length` keys.

    `heads` are its query heads and their key heads.
    """
    if index in held.elsewhere:
        return
    expert = held.experts[index]
    reach = expert.reach(length) if expert.kernel.softmax else None
    # an expert of the user's knows all of its heads alone
    queries, key_heads = heads if reach is not None else WHOLE
    first = 0 if reach is None else max(length - reach, 0)
    q, k, v = held.inputs(expert)
    k, v = (_stored(x[row, key_heads], first, length, slots) for x in (k, v))
    found = expert(q[row], k, v) if reach is None else _softmax(q[row, queries], k, v)
    out[row, heads[0]] = found[:, heads[0]] if reach is None else found


def _stored(x: Tensor, first: int, stop: int, slots: int) -> Tensor:
    """Positions first .. stop - 1 of a store [B, Hkv, S, Dh], in a ring maybe in another order.

    Softmax knows none.
    """
    start, end = first % slots, (stop - 1) % slots + 1
    if stop - first >= slots:
        return x[:, :, :slots]
    return (
        x[:, :, start:end] if start < end else torch.cat([x[:, :, start:slots], x[:, :, :end]], 2)
    )


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One query over all the keys given.

    Queries that share a key head packed, [B, H, 1, Dh] -> [B, Hkv, G, Dh].
    """
    packed = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
    return F.scaled_dot_product_attention(packed, k, v, attn_mask=mask).flatten(1, 2).unsqueeze(2)


def _masked(held: RoutedProblem, slots: int, ring: bool) -> Tensor:
    """Static shapes and no synchronisation, at the price of reading every slot."""
    assert held.starts is not None
    last = held.starts[:, None]
    age = last - torch.arange(slots, device=held.q.device)  # [B, S], tokens since the slot's own
    age = torch.where(last < age % slots, -1, age % slots) if ring else age
    age = age[:, None, None]  # [B, 1, 1, S]
    seen = torch.zeros_like(age, dtype=torch.bool)
    for index, expert in held.computed():
        # [B, H or 1, 1, S]
        seen = seen | (held.chosen(index) & (age >= 0) & (age < (expert.reach(slots) or 0)))
    computed = seen.any(-1, keepdim=True)
    mask = seen | ~computed  # a row that sees nothing would divide by zero
    # as queries are packed
    mask = mask if held.units == 1 else mask.squeeze(2).unflatten(1, (held.k.shape[1], -1))
    out = _softmax(held.q, held.k[:, :, :slots], held.v[:, :, :slots], mask)
    return torch.where(computed, out, 0.0)
