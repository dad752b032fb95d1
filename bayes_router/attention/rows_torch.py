"""Hard routing in plain torch: the queries of each expert gathered by position, in chunks. Any device; made for the CPU.

One sequence at a time, q [H, Tq, Dh], k and v [Hkv, Tk, Dh], the queries the last Tq of Tk positions; `rows` are ascending
indices of queries, and the result has only those. Queries that share a key head are packed side by side, so that keys are
never repeated. Nothing is T x T: the widest mask is ROWS x T. It reads counts on the host, which synchronises on CUDA.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bayes_router.attention.full import FullAttention
from bayes_router.attention.linear import EPSILON, LinearAttention, feature_map, with_ones
from bayes_router.attention.local import LocalAttention
from bayes_router.attention.problem import RoutedProblem

ROWS = 256  # packed queries in a chunk of full attention
SPAN = 128  # positions in a block of local queries, at least
CHUNK = 128  # positions between two states of linear attention


def attend(problem: RoutedProblem) -> Tensor:
    """The backend `torch`: [B, H, Tq, Dh]."""
    Tq = problem.q.shape[2]
    rows = [F.pad(_attend_sequence(one), (0, 0, 0, Tq - one.q.shape[2])) for one in problem.sequences()]
    return torch.stack(rows) if rows else torch.zeros_like(problem.q)


def _attend_sequence(one: RoutedProblem) -> Tensor:
    """[H, Tq, Dh] of a problem with B = 1 and no padding."""
    route, out = one.route[0], torch.zeros_like(one.q[0])
    for index, expert in one.computed():
        rows = (route == index).nonzero()[:, 0]
        if not rows.numel():
            continue
        inputs = one.inputs(expert)
        if rows.numel() == route.numel():  # nothing to gather
            return expert(*inputs)[0]
        q, k, v = (x[0] for x in inputs)
        if type(expert) is FullAttention:
            chosen = full_rows(q, k, v, rows)
        elif type(expert) is LocalAttention:
            chosen = local_rows(q, k, v, rows, expert.shape.window)
        elif type(expert) is LinearAttention:
            chosen = linear_rows(q, k, v, rows)
        else:  # a subclass may compute anything: it answers for its own rows
            chosen = expert.attend_rows(*inputs, one.route == index)[0].index_select(1, rows)
        out = out.index_copy(1, rows, chosen)
    return out


def full_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Full attention of the chosen queries, in chunks that see the keys up to their last position: [H, n, Dh]."""
    groups = q.shape[0] // k.shape[0]
    size = max(ROWS // groups, 1)
    parts = [_masked_rows(q, k, v, part, None) for part in rows.split(size)]
    return torch.cat(parts, 1)


def local_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, window: int) -> Tensor:
    """Windowed attention of the chosen queries, in blocks of neighbouring positions: [H, n, Dh].

    A block spans S = max(W, SPAN) positions however many of them are chosen, so it reads at most S + W - 1 keys.
    """
    span = max(window, SPAN)
    counts = torch.bincount(rows // span)
    parts = [_masked_rows(q, k, v, part, window) for part in rows.split(counts[counts > 0].tolist())]
    return torch.cat(parts, 1)


def _masked_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, window: int | None) -> Tensor:
    """softmax attention of neighbouring queries over the hull of the keys that they see: [H, n, Dh]."""
    start = k.shape[1] - q.shape[1]
    positions = rows + start
    last = int(positions[-1]) + 1
    first = 0 if window is None else max(int(positions[0]) - window + 1, 0)
    queries, keys, values = q.index_select(1, rows), k[:, first:last], v[:, first:last]

    def attend_block(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        H, n, Dh = queries.shape
        key = torch.arange(first, last, device=q.device)
        hidden = key > positions[:, None]
        if window is not None:
            hidden |= key <= positions[:, None] - window
        mask = torch.zeros(n, last - first, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
        packed = queries.reshape(keys.shape[0], -1, Dh)  # [H, n, Dh] -> [Hkv, G * n, Dh]
        mask = mask.repeat(H // keys.shape[0], 1)
        out = F.scaled_dot_product_attention(packed[None], keys[None], values[None], attn_mask=mask)
        return out.reshape(H, n, Dh)

    if torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values)):  # keep no mask for backward
        out: Tensor = checkpoint(attend_block, queries, keys, values, use_reentrant=False, preserve_rng_state=False)
        return out
    return attend_block(queries, keys, values)


def linear_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Linear attention of the chosen queries: [H, n, Dh]; see `linear_rows_from`."""
    past = k.shape[1] - q.shape[1]
    phi_past = feature_map(k[:, :past].float())
    state = phi_past.transpose(1, 2) @ with_ones(v[:, :past].float())
    return linear_rows_from(q, k[:, past:], v[:, past:], rows, state)[0]


def linear_rows_from(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Every new key enters the state [Hkv, Dh, Dh + 1], only the chosen queries read it: ([H, n, Dh], the new state).

    States at each chunk's start, and inside a chunk the masked product of its chosen queries with its keys.
    """
    T, Hkv = k.shape[1], k.shape[0]
    chunk = min(CHUNK, T)
    pad = -T % chunk
    phi_k = F.pad(feature_map(k.float()), (0, 0, 0, pad)).unflatten(1, (-1, chunk))  # [Hkv, N, C, Dh]
    value = F.pad(with_ones(v.float()), (0, 0, 0, pad)).unflatten(1, (-1, chunk))  # [Hkv, N, C, Dh + 1]
    update = phi_k.transpose(-1, -2) @ value
    running = torch.cat([state[:, None], update], 1).cumsum(1)  # [Hkv, N + 1, Dh, Dh + 1]

    table, index, slot = _chunk_table(rows, chunk, phi_k.shape[1])  # [N, M]: the chosen queries of each chunk
    phi_q = feature_map(q[:, table].float())  # [H, N, M, Dh]
    phi_q = phi_q.unflatten(0, (Hkv, -1)).transpose(1, 2).flatten(2, 3)  # [Hkv, N, G * M, Dh]
    seen = (table % chunk)[..., None] >= torch.arange(chunk, device=q.device)  # [N, M, C]
    groups = q.shape[0] // Hkv
    scores = (phi_q @ phi_k.transpose(-1, -2)) * seen.repeat(1, groups, 1)
    summed = phi_q @ running[:, :-1] + scores @ value
    out = summed[..., :-1] / (summed[..., -1:] + EPSILON)
    out = out.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)  # [H, N, M, Dh]
    return out[:, index, slot].to(v.dtype), running[:, -1]


def _chunk_table(rows: Tensor, chunk: int, num_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen rows of each chunk, padded to the longest list, [N, M]; and where each row stands in it, [n] and [n]."""
    index = rows // chunk
    counts = torch.bincount(index, minlength=num_chunks)
    slot = torch.arange(rows.numel(), device=rows.device) - (counts.cumsum(0) - counts)[index]
    most = int(counts.max()) if rows.numel() else 0
    table = torch.zeros(num_chunks, most, dtype=torch.int64, device=rows.device)
    table[index, slot] = rows
    return table, index, slot
