# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of linear attention.

What each chunk of keys adds, the running state before each chunk, and the reads.

    out_t = sum_s w_ts v_s / (sum_s w_ts + EPSILON),  s <= t,  w_ts = phi(q_t) . phi(k_s)
    DECAY: queries and keys come as features,         w_ts = (q_t . k_s) exp(decay_t - decay_s)

with phi = elu + 1. `Decay` is float64 [B, H, Tk], the sum of the log gates up to each key: after
32k tokens float32 would hold it to 1e-4 only. Differences are taken first, then rounded to float32,
and no positive number is exponentiated.

Heads: K has H / GROUP of them and V those / VGROUP. Plain linear attention shares keys among
queries (VGROUP = 1); a gate is a query head's own, so with DECAY keys are one a query head (GROUP =
1). States belong to heads of K:

    S [B, HK, NC, D, D] in bfloat16 (float32 for float32 inputs; float16 would overflow), z [B, HK,
    NC, D] in float32,

first what chunk c adds, as seen from its end, then (after `prefix_kernel`) what stands before it.
Sums are taken in float32.
"""

import triton
import triton.language as tl

from bayes_router.attention.kernels.triton.launch import follow
from bayes_router.attention.kernels.triton.rows import (
    EPSILON,
    count_rows,
    gather_rows,
    phi,
    table_row,
)


@triton.jit
def feature_map(x, DECAY: tl.constexpr):
    """phi(x) in float32; with DECAY x is a feature already."""
    return x.to(tl.float32) if DECAY else phi(x.to(tl.float32))


@triton.jit
def edge(Decay, token, num_keys):
    """The decay of all keys before `token`, float64; a scalar or a block."""
    at = tl.minimum(token, num_keys)
    return tl.load(Decay + at - 1, mask=at > 0, other=0.0)


@triton.jit
def elapsed(Decay, n, base, inside):
    """decay_n - base in float32; some number where not inside."""
    return (tl.load(Decay + n, mask=inside, other=0.0) - base).to(tl.float32)


@triton.jit
def fade(later, earlier):
    """exp(later - earlier), at most 1."""
    return tl.exp(tl.minimum(later - earlier, 0.0))


@triton.jit
def decay_kernel(LogGate, Decay, T, BLOCK: tl.constexpr):
    """Sums of the log gates up to each key, float64; program: a head of a row of the batch."""
    follow()
    row = tl.program_id(0).to(tl.int64) * T
    before = tl.zeros([1], tl.float64)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        gate = tl.load(LogGate + row + t, mask=t < T, other=0.0).to(tl.float64)
        tl.store(Decay + row + t, before + tl.cumsum(gate, 0), mask=t < T)
        before += tl.sum(gate, 0)


@triton.jit
def add_chunk(
    K, V, S, Z, Decay, k_b, k_h, k_t, v_b, v_h, v_t, HK, VGROUP, num_keys, NC, c, h, b,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk of keys adds to the state: sum phi(k) v^T and sum phi(k)."""
    K += b * k_b + h * k_h
    V += b * v_b + h // VGROUP * v_h
    Decay += (b * HK + h) * num_keys
    d = tl.arange(0, D)
    s = tl.zeros([D, D], tl.float32)
    z = tl.zeros([D], tl.float32)
    if DECAY:
        end = edge(Decay, (c + 1) * CHUNK, num_keys)
    for n0 in range(0, CHUNK, BN):
        n = c * CHUNK + n0 + tl.arange(0, BN)
        inside = n < num_keys
        nothing = 0.0 if DECAY else -float("inf")  # phi sends it to zero
        k = tl.load(
            K + n[:, None].to(tl.int64) * k_t + d[None, :], mask=inside[:, None], other=nothing
        )
        v = tl.load(V + n[:, None].to(tl.int64) * v_t + d[None, :], mask=inside[:, None], other=0.0)
        feature = feature_map(k, DECAY)
        if DECAY:
            feature *= fade(-elapsed(Decay, n, end, inside), 0.0)[:, None]
        feature = feature.to(v.dtype)
        if DECAY:
            s = tl.dot(tl.trans(feature), v, s, input_precision=PRECISION)
        else:  # transposed: of the two the values, as they were loaded, are the operand to turn
            s = tl.dot(tl.trans(v), feature, s, input_precision=PRECISION)
        z += tl.sum(feature.to(tl.float32), 0)
    if not DECAY:
        s = tl.trans(s)
    row = (b * HK + h) * NC + c
    tl.store(S + row * D * D + d[:, None] * D + d[None, :], s.to(S.dtype.element_ty))
    tl.store(Z + row * D + d, z)


@triton.jit
def chunk_kernel(
    K, V, S, Z, Decay, k_b, k_h, k_t, v_b, v_h, v_t, HK, VGROUP, num_keys, NC,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (chunk, head of K, row of the batch)."""
    follow()
    add_chunk(
        K, V, S, Z, Decay, k_b, k_h, k_t, v_b, v_h, v_t, HK, VGROUP, num_keys, NC,
        tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), DECAY,
        CHUNK, BN, D, PRECISION,
    )  # fmt: skip


@triton.jit
def _prefix(
    X, x, WIDTH: tl.constexpr, NC, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place, entries x of what stands before each chunk of X [NC, WIDTH]; REVERSE: after it."""
    inside = x < WIDTH
    carried = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, NC, num_stages=6):  # the next five are on their way
        c = NC - 1 - i if REVERSE else i
        at = X + c.to(tl.int64) * WIDTH + x
        added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, carried.to(X.dtype.element_ty), mask=inside)
        carried += added


@triton.jit
def _faded_prefix(
    X, Y, Decay, Cross, x, WIDTH: tl.constexpr, NC, num_keys,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of what fades, N chunks at a time: as a matrix of what is left from each to each.

    With REVERSE, Cross [NC] is its product with Y one chunk on.
    """
    i = tl.arange(0, N)
    carried = tl.zeros([BLOCK], tl.float32)
    for c0 in range(0, NC, N):
        c = c0 + i
        inside = c < NC
        if REVERSE:
            c = NC - 1 - c
        mask = inside[:, None] & (x < WIDTH)[None, :]
        at = X + c[:, None].to(tl.int64) * WIDTH + x[None, :]
        added = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        # `here` is the edge of the chunk where one enters it, `there` where one leaves it
        first = tl.maximum(c, 0) * CHUNK
        here, there = edge(Decay, first, num_keys), edge(Decay, first + CHUNK, num_keys)
        if REVERSE:
            here, there = there, here
        base = tl.sum(tl.where(i == 0, here, 0.0), 0)
        here, there = (here - base).to(tl.float32), (there - base).to(tl.float32)
        left = fade(-tl.abs(here[:, None] - there[None, :]), 0.0)
        left = tl.where(i[:, None] > i[None, :], left, 0.0)
        before = tl.dot(left, added, input_precision="ieee")
        before += fade(-tl.abs(here), 0.0)[:, None] * carried[None, :]
        tl.store(at, before.to(X.dtype.element_ty), mask=mask)
        if REVERSE:
            known = mask & (c + 1 < NC)[:, None]
            on = Y + (c[:, None] + 1).to(tl.int64) * WIDTH + x[None, :]
            y = tl.load(on, mask=known, other=0.0).to(tl.float32)
            tl.store(Cross + c, tl.sum(tl.where(known, before * y, 0.0), 1), mask=inside)
        after = before * fade(-tl.abs(there - here), 0.0)[:, None] + added
        carried = tl.sum(tl.where((i == N - 1)[:, None], after, 0.0), 0)


@triton.jit
def prefix_kernel(
    S, Z, OtherS, OtherZ, Decay, Cross, NC, num_keys,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place, the states before each chunk (REVERSE: after it).

    The last programs of a head take z.

    With REVERSE and DECAY, Cross [B HK, parts, NC] adds up over its parts to the product of what
    stands after each chunk and the state (OtherS, OtherZ) that stands before the next: all pairs of
    a query and a key that the boundary parts.
    """
    follow()
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Decay += head * num_keys
    Cross += (head * tl.num_programs(0) + part) * NC
    before: tl.constexpr = D * D // BLOCK
    x = tl.where(part < before, part, part - before) * BLOCK + tl.arange(0, BLOCK)
    S += head * NC * D * D
    Z += head * NC * D
    if DECAY:
        if part < before:
            _faded_prefix(S, OtherS + head * NC * D * D, Decay, Cross, x, D * D, NC, num_keys,
                          REVERSE, CHUNK, N, BLOCK)  # fmt: skip
        else:
            _faded_prefix(Z, OtherZ + head * NC * D, Decay, Cross, x, D, NC, num_keys, REVERSE,
                          CHUNK, N, BLOCK)  # fmt: skip
    elif part < before:
        _prefix(S, x, D * D, NC, REVERSE, BLOCK)
    else:
        _prefix(Z, x, D, NC, REVERSE, BLOCK)


@triton.jit
def linear_kernel(
    Q, K, V, Out, Lse, S, Z, Decay, Order, Before, Starts, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h,
    v_t, o_b, o_h, o_t,
    H, GROUP, VGROUP, UNIT, T, NB, num_keys, start, NC,
    DECAY: tl.constexpr, SORTED: tl.constexpr, STARTS: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads of a block of (sorted) queries.

    The state before the chunk of the first, and the keys from there on.
    """
    follow()
    h, i, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    u = table_row(b, h, H, UNIT)
    if i * BM >= count_rows(Before, u, 1, T, NB, SORTED):
        return
    begin = start
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    t, real, first, last = gather_rows(Order, Before, u, 1, i, T, NB, SORTED, BM)
    pos, d = t + begin, tl.arange(0, D)
    q = tl.load(Q + b * q_b + h * q_h + t[:, None].to(tl.int64) * q_t + d[None, :])
    feature = feature_map(q, DECAY).to(q.dtype)
    c = (first + begin) // CHUNK
    hk = h // GROUP
    row = (b * (H // GROUP) + hk) * NC + c
    s = tl.load(S + row * D * D + d[:, None] * D + d[None, :])
    z = tl.load(Z + row * D + d)
    acc = tl.dot(feature.to(s.dtype), s, input_precision=PRECISION)
    den = tl.sum(feature.to(tl.float32) * z[None, :], 1)
    Decay += (b * (H // GROUP) + hk) * num_keys
    if DECAY:
        since = tl.load(Decay + pos)
        kept = fade((since - edge(Decay, c * CHUNK, num_keys)).to(tl.float32), 0.0)
        acc *= kept[:, None]
        den *= kept
    K += b * k_b + hk * k_h
    V += b * v_b + hk // VGROUP * v_h
    for n0 in range(c * CHUNK, last + begin + 1, BN):
        n = n0 + tl.arange(0, BN)
        inside = n < num_keys
        k = tl.load(K + n[:, None].to(tl.int64) * k_t + d[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(V + n[:, None].to(tl.int64) * v_t + d[None, :], mask=inside[:, None], other=0.0)
        a = tl.dot(feature, tl.trans(feature_map(k, DECAY).to(q.dtype)), input_precision=PRECISION)
        if DECAY:
            base = tl.load(Decay + n0)
            a *= fade(
                (since - base).to(tl.float32)[:, None], elapsed(Decay, n, base, inside)[None, :]
            )
        a = tl.where(n[None, :] <= pos[:, None], a, 0.0)
        den += tl.sum(a, 1)
        acc = tl.dot(a.to(v.dtype), v, acc, input_precision=PRECISION)
    den += EPSILON
    at = Out + b * o_b + h * o_h + t[:, None].to(tl.int64) * o_t + d[None, :]
    tl.store(at, (acc / den[:, None]).to(Out.dtype.element_ty), mask=real[:, None])
    tl.store(Lse + (b * H + h) * T + t, den, mask=real)
