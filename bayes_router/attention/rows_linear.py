"""Linear attention of chosen queries in plain torch, SEGMENT keys at a time: every key enters the state, the chosen read it.

Letters as in `rows_torch`. The state [Hkv, Dh, Dh + 1] is S and, in its last column, z of `LinearAttention`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.expert import widen
from bayes_router.attention.linear import EPSILON, feature_map

CHUNK = 64  # positions between two states
SEGMENT = 256  # positions at a time: what a pass writes stays in the processor's cache


def attend(queries: Tensor, k: Tensor, v: Tensor, positions: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Output [H, n, Dh] of gathered queries [H, n, Dh] at ascending positions [n]; with `keep`, each segment's first state."""
    state = k.new_zeros(k.shape[0], k.shape[2], k.shape[2] + 1, dtype=widen(k[:0]).dtype)
    out = queries.new_empty(queries.shape[1], queries.shape[0], queries.shape[2]).transpose(0, 1)
    states = []
    for here, keys in _segments(positions, k.shape[1]):
        if keep:
            states.append(state)
        out[:, here], state = _segment(queries[:, here], k[:, keys], v[:, keys], positions[here] - keys.start, state)
    return out, states


def backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, positions: Tensor, states: list[Tensor], dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of `attend` for `rows` of q [H, Tq, Dh] to dq, dk and dv. One segment is computed again at a time."""
    later: Tensor | None = None  # gradient of the state after the segment
    for (here, keys), state in zip(reversed(_segments(positions, k.shape[1])), reversed(states), strict=True):
        inputs = [x.detach().requires_grad_() for x in (take(q, rows[here]), k[:, keys], v[:, keys], state)]
        with torch.enable_grad():
            out, after = _segment(inputs[0], inputs[1], inputs[2], positions[here] - keys.start, inputs[3])
        given = (take(dout, rows[here]), torch.zeros_like(after) if later is None else later)
        found = torch.autograd.grad((out, after), inputs, given)
        later = found[3]
        add_rows(dq, rows[here], found[0])
        dk[:, keys] += found[1]
        dv[:, keys] += found[2]


def _segments(positions: Tensor, num_keys: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of each segment up to the last with a query."""
    found, stop = [], 0
    for index, count in enumerate(torch.bincount(positions // SEGMENT).tolist()):
        start, stop = stop, stop + count
        found.append((slice(start, stop), slice(index * SEGMENT, min((index + 1) * SEGMENT, num_keys))))
    return found


def _segment(queries: Tensor, k: Tensor, v: Tensor, rows: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [H, n, Dh] at `rows` of a segment read; all its keys enter: ([H, n, Dh], the next state).

    States at each chunk's start, and inside a chunk the masked product of its chosen queries with its keys.
    """
    (Hkv, T, Dh), H = k.shape, queries.shape[0]
    chunk = min(CHUNK, T)
    phi_k = _chunks(feature_map(widen(k).contiguous()), chunk)  # [Hkv, N, C, Dh]
    value = _chunks(widen(v).contiguous(), chunk)
    update = (phi_k.transpose(-1, -2) @ value).unbind(1), phi_k.sum(2).unbind(1)
    running, total = [state[..., :Dh]], [state[..., Dh]]
    for s, z in zip(*update, strict=True):
        running.append(running[-1] + s)
        total.append(total[-1] + z)
    after = torch.cat([running[-1], total[-1][..., None]], -1)
    if not rows.numel():
        return queries, after

    table, index, slot = _chunk_table(rows, chunk, phi_k.shape[1])  # [N, M]: which of the queries each chunk has
    phi_q = feature_map(widen(queries[:, table]))  # [H, N, M, Dh]
    phi_q = phi_q.unflatten(0, (Hkv, -1)).transpose(1, 2).flatten(2, 3)  # [Hkv, N, G * M, Dh]
    hidden = (rows[table] % chunk)[..., None] < torch.arange(chunk, device=k.device)  # [N, M, C]
    groups = H // Hkv
    scores = (phi_q @ phi_k.transpose(-1, -2)).masked_fill_(hidden.repeat(1, groups, 1), 0.0)
    weight = (phi_q @ torch.stack(total[:-1], 1)[..., None]).squeeze(-1) + scores.sum(-1)  # [Hkv, N, G * M]
    summed = phi_q @ torch.stack(running[:-1], 1) + scores @ value
    out = summed / (weight[..., None] + EPSILON)
    out = out.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)  # [H, N, M, Dh]
    return out[:, index, slot].to(v.dtype), after


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[H, T, Dh] -> [H, N, C, Dh], the last chunk filled with zeros."""
    pad = -x.shape[1] % chunk
    return (F.pad(x, (0, 0, 0, pad)) if pad else x).unflatten(1, (-1, chunk))


def _chunk_table(rows: Tensor, chunk: int, num_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries of `rows` each chunk has, padded to the longest list, [N, M]; and where each entry stands, [n] and [n]."""
    index = rows // chunk
    counts = torch.bincount(index, minlength=num_chunks)
    entries = torch.arange(rows.numel(), device=rows.device)
    slot = entries - (counts.cumsum(0) - counts)[index]
    table = torch.zeros(num_chunks, int(counts.max()), dtype=torch.int64, device=rows.device)
    table[index, slot] = entries
    return table, index, slot


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x [H, T, Dh]: [H, n, Dh], by tokens, as models lay them out: a token is copied as one piece."""
    return x.transpose(0, 1).index_select(0, rows).transpose(0, 1)


def add_rows(x: Tensor, rows: Tensor, added: Tensor) -> None:
    """Add [H, n, Dh] to different rows of x [H, T, Dh]; torch's own index_add_ takes rows one by one."""
    x.transpose(0, 1).index_copy_(0, rows, (take(x, rows) + added).transpose(0, 1))
