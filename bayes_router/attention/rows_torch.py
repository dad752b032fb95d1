"""Hard routing in plain torch: the queries of each expert gathered by position, in chunks. Any device; made for the CPU.

One sequence at a time, q [H, Tq, Dh], k and v [Hkv, Tk, Dh], the queries the last Tq of Tk positions; `rows` are ascending
indices of queries, and the result has only those. Queries that share a key head are packed side by side, so that keys are
never repeated. Nothing is T x T: the widest mask is ROWS x T. It reads counts on the host, which synchronises on CUDA.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bayes_router.attention.full import FullAttention
from bayes_router.attention.linear import EPSILON, LinearAttention, feature_map, with_ones
from bayes_router.attention.local import LocalAttention
from bayes_router.attention.problem import RoutedProblem

ROWS = 128  # packed queries in a chunk of full attention
FAR_ROWS = 1024  # queries that share one call for the keys that all of them see
SPAN = 128  # positions in a block of local queries, at least
CHUNK = 64  # positions between two states of linear attention
SEGMENT = 1024  # positions of linear attention at a time: what a pass writes stays in the processor's cache


def attend(problem: RoutedProblem) -> Tensor:
    """The backend `torch`: [B, H, Tq, Dh]."""
    Tq = problem.q.shape[2]
    rows = [F.pad(_attend_sequence(one), (0, 0, 0, Tq - one.q.shape[2])) for one in problem.sequences()]
    return torch.stack(rows) if rows else torch.zeros_like(problem.q)


def _attend_sequence(one: RoutedProblem) -> Tensor:
    """[H, Tq, Dh] of a problem with B = 1 and no padding."""
    route = one.route[0]
    parts, taken = [], []
    for index, expert in enumerate(one.experts):
        rows = (route == index).nonzero()[:, 0]
        if not rows.numel():
            continue
        taken.append(rows)
        inputs = one.inputs(expert)
        if index in one.elsewhere:
            parts.append(torch.zeros_like(one.q[0, :, : rows.numel()]))
        elif rows.numel() == route.numel():  # nothing to gather
            return expert(*inputs)[0]
        else:
            q, k, v = (x[0] for x in inputs)
            if type(expert) is FullAttention:
                parts.append(full_rows(q, k, v, rows))
            elif type(expert) is LocalAttention:
                parts.append(local_rows(q, k, v, rows, expert.shape.window))
            elif type(expert) is LinearAttention:
                parts.append(linear_rows(q, k, v, rows))
            else:  # a subclass may compute anything: it answers for its own rows
                parts.append(expert.attend_rows(*inputs, one.route == index)[0].index_select(1, rows))
    if not taken:
        return torch.zeros_like(one.q[0])
    order = torch.cat(taken)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return torch.cat(parts, 1).index_select(1, place)


def full_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Full attention of the chosen queries, in chunks that see the keys up to their last position: [H, n, Dh]."""
    size = max(ROWS // (q.shape[0] // k.shape[0]), 1)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and not recorded:
        return torch.cat([_far_and_near(q, k, v, part, size) for part in rows.split(FAR_ROWS)], 1)
    sizes = [part.numel() for part in rows.split(size)]
    out: Tensor = _ChunkedRows.apply(q.index_select(1, rows), k, v, rows + k.shape[1] - q.shape[1], sizes, None)
    return out


def local_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, window: int) -> Tensor:
    """Windowed attention of the chosen queries, in blocks of neighbouring positions: [H, n, Dh].

    A block spans S = max(W, SPAN) positions however many of them are chosen, so it reads at most S + W - 1 keys.
    """
    counts = torch.bincount(rows // max(window, SPAN))
    sizes = counts[counts > 0].tolist()
    out: Tensor = _ChunkedRows.apply(q.index_select(1, rows), k, v, rows + k.shape[1] - q.shape[1], sizes, window)
    return out


class _ChunkedRows(torch.autograd.Function):
    """Softmax attention of queries [H, n, Dh] at ascending positions [n], cut into `sizes`; memory O(n + T).

    The backward pass takes one chunk at a time again: no mask is kept, and gradients of keys are added where they belong.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, k: Tensor, v: Tensor, positions: Tensor, sizes: list[int], window: int | None
    ) -> Tensor:
        ctx.save_for_backward(queries, k, v, positions)
        ctx.sizes, ctx.window = sizes, window
        parts = []
        for q, at in zip(queries.split(sizes, 1), positions.split(sizes), strict=True):
            keys = _hull(at, window)
            parts.append(_masked(q, k[:, keys], v[:, keys], at, window))
        return torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, k, v, positions = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(queries), torch.zeros_like(k), torch.zeros_like(v)
        chunks = (x.split(ctx.sizes, 1) for x in (queries, dq, gradients[0]))
        for q, dq_part, gradient, at in zip(*chunks, positions.split(ctx.sizes), strict=True):
            keys = _hull(at, ctx.window)
            inputs = [x.detach().requires_grad_() for x in (q, k[:, keys], v[:, keys])]
            with torch.enable_grad():
                out = _masked(inputs[0], inputs[1], inputs[2], at, ctx.window)
            found = torch.autograd.grad(out, inputs, gradient)
            dq_part.copy_(found[0])
            dk[:, keys] += found[1]
            dv[:, keys] += found[2]
        return dq, dk, dv, None, None, None


def _hull(positions: Tensor, window: int | None) -> slice:
    """The keys that some query at these ascending positions sees."""
    return slice(0 if window is None else max(int(positions[0]) - window + 1, 0), int(positions[-1]) + 1)


def _masked(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Attention of queries [H, n, Dh] over the keys of their hull: [H, n, Dh]."""
    keys = _hull(positions, window)
    mask = _mask(positions, keys.start, window, q.dtype).repeat(q.shape[0] // k.shape[0], 1)
    packed = q.reshape(1, k.shape[0], -1, q.shape[2])  # [H, n, Dh] -> [1, Hkv, G * n, Dh]
    return F.scaled_dot_product_attention(packed, k[None], v[None], attn_mask=mask).reshape(q.shape)


def _mask(positions: Tensor, first: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[n, keys from `first` to the last position]: 0 where visible, -inf elsewhere."""
    key = torch.arange(first, int(positions[-1]) + 1, device=positions.device)
    hidden = key > positions[:, None]
    if window is not None:
        hidden |= key <= positions[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=key.device).masked_fill_(hidden, -torch.inf)


def _far_and_near(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, size: int) -> Tensor:
    """Full attention of FAR_ROWS neighbouring queries or fewer, on the CPU without gradients: [H, n, Dh].

    Keys before the first query are seen by all: one large call without a mask. The rest in chunks of `size` with one. The two
    are joined by their softmax normalisers, which only torch's own operator returns.
    """
    start = k.shape[1] - q.shape[1]
    first = int(rows[0]) + start
    near, near_lse = zip(*(_with_normaliser(q, k, v, part, start, first) for part in rows.split(size)), strict=True)
    if first == 0:
        return torch.cat(near, 1)
    far, far_lse = _with_normaliser(q, k[:, :first], v[:, :first], rows, start, None)
    share = torch.sigmoid(far_lse - torch.cat(near_lse, 1))[..., None].to(q.dtype)
    return torch.lerp(torch.cat(near, 1), far, share)


def _with_normaliser(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, start: int, first: int | None) -> tuple[Tensor, Tensor]:
    """(output [H, n, Dh], log of the softmax normaliser [H, n]) over keys from `first` on; over all given if None."""
    H, _, Dh = q.shape
    packed = q.index_select(1, rows).reshape(1, k.shape[0], -1, Dh)  # [1, Hkv, G * n, Dh]
    mask = None
    if first is not None:
        mask = _mask(rows + start, first, None, q.dtype).repeat(H // k.shape[0], 1)
        keys = slice(first, int(rows[-1]) + start + 1)
        k, v = k[:, keys], v[:, keys]
    attend_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend_part(packed, k[None], v[None], attn_mask=mask)
    return out.reshape(H, -1, Dh), lse.reshape(H, -1)


def linear_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Linear attention of the chosen queries, SEGMENT keys at a time: [H, n, Dh].

    Every key enters the state [Hkv, Dh, Dh + 1]; only the chosen queries read it.
    """
    past, T = k.shape[1] - q.shape[1], q.shape[1]
    phi_past = feature_map(k[:, :past].float())
    state = phi_past.transpose(1, 2) @ with_ones(v[:, :past].float())
    counts = torch.bincount(rows // SEGMENT, minlength=-(-T // SEGMENT)).tolist()
    queries = q.index_select(1, rows).split(counts, 1)
    keys, values = k[:, past:].split(SEGMENT, 1), v[:, past:].split(SEGMENT, 1)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    parts = []
    for index, (x, key, value, at) in enumerate(zip(queries, keys, values, rows.split(counts), strict=True)):
        arguments = (x, key, value, at - index * SEGMENT, state)
        if recorded:  # keep nothing of a segment but its inputs
            out, state = checkpoint(_linear_segment, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = _linear_segment(*arguments)
        parts.append(out)
    return torch.cat(parts, 1)


def _linear_segment(queries: Tensor, k: Tensor, v: Tensor, rows: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [H, n, Dh] at `rows` of a segment read; all its keys enter: ([H, n, Dh], the next state).

    States at each chunk's start, and inside a chunk the masked product of its chosen queries with its keys.
    """
    T, (H, _, Dh), Hkv = k.shape[1], queries.shape, k.shape[0]
    chunk = min(CHUNK, T)
    pad = -T % chunk
    phi_k = F.pad(feature_map(k.float()), (0, 0, 0, pad)).unflatten(1, (-1, chunk))  # [Hkv, N, C, Dh]
    value = F.pad(v.float(), (0, 0, 0, pad)).unflatten(1, (-1, chunk))
    update = phi_k.transpose(-1, -2) @ value, phi_k.sum(2)
    running = torch.cat([state[:, None, :, :Dh], update[0]], 1).cumsum(1)  # [Hkv, N + 1, Dh, Dh]
    total = torch.cat([state[:, None, :, Dh], update[1]], 1).cumsum(1)  # [Hkv, N + 1, Dh]
    after = torch.cat([running[:, -1], total[:, -1, :, None]], -1)
    if not rows.numel():
        return queries, after

    table, index, slot = _chunk_table(rows, chunk, phi_k.shape[1])  # [N, M]: which of the queries each chunk has
    phi_q = feature_map(queries[:, table].float())  # [H, N, M, Dh]
    phi_q = phi_q.unflatten(0, (Hkv, -1)).transpose(1, 2).flatten(2, 3)  # [Hkv, N, G * M, Dh]
    hidden = (rows[table] % chunk)[..., None] < torch.arange(chunk, device=k.device)  # [N, M, C]
    groups = H // Hkv
    scores = (phi_q @ phi_k.transpose(-1, -2)).masked_fill(hidden.repeat(1, groups, 1), 0.0)
    summed = phi_q @ running[:, :-1] + scores @ value
    weight = (phi_q @ total[:, :-1, :, None]).squeeze(-1) + scores.sum(-1)  # [Hkv, N, G * M]
    out = summed / (weight[..., None] + EPSILON)
    out = out.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)  # [H, N, M, Dh]
    return out[:, index, slot].to(v.dtype), after


def _chunk_table(rows: Tensor, chunk: int, num_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries of `rows` each chunk has, padded to the longest list, [N, M]; and where each entry stands, [n] and [n]."""
    index = rows // chunk
    counts = torch.bincount(index, minlength=num_chunks)
    entries = torch.arange(rows.numel(), device=rows.device)
    slot = entries - (counts.cumsum(0) - counts)[index]
    table = torch.zeros(num_chunks, int(counts.max()), dtype=torch.int64, device=rows.device)
    table[index, slot] = entries
    return table, index, slot
