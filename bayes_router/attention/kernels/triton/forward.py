# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of the routed forward pass; `launch_forward` launches them.

Each program takes a block of queries of one kind, gathered by the order of `plan`, so that its rows
cost the same. Softmax is taken online in base 2. Besides the output each row leaves `Lse`: log2 of
its softmax normaliser, or its denominator under linear attention; the backward pass reads it.
"""

import triton
import triton.language as tl

from bayes_router.attention.kernels.triton.launch import follow
from bayes_router.attention.kernels.triton.rows import (
    HIDDEN,
    LANES,
    band_start,
    band_tile,
    count_rows,
    gather_rows,
    load_keys,
    reach_of,
    sees,
    table_row,
)


@triton.jit
def _soften(
    s,
    v,
    n,
    pos,
    reach,
    m,
    norm,
    acc,
    scale,
    MASKED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of online softmax: raw scores s of keys n."""
    if MASKED:
        s = tl.where(
            sees(pos[:, None], n[None, :], reach_of(n[None, :], reach, SINKS)), s, -float("inf")
        )
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    norm = norm * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, norm, acc


@triton.jit
def _tile(q, K, V, n0, num_keys, k_t, v_t, pos, reach, m, norm, acc, scale, MASKED: tl.constexpr,
    BN: tl.constexpr,
          D: tl.constexpr, PRECISION: tl.constexpr, SINKS: tl.constexpr = 0):  # fmt: skip
    """Keys n0 .. n0 + BN, loaded by address."""
    n, k, v = load_keys(K, V, n0, num_keys, k_t, v_t, MASKED, BN, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return _soften(s, v, n, pos, reach, m, norm, acc, scale, MASKED, SINKS, PRECISION)


@triton.jit
def attend_keys(q, K, V, lo, seen, hi, num_keys, k_t, v_t, pos, scale, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Softmax over keys lo .. hi, of which every row sees those before `seen`.

    (maxima, normalisers, weighted sums). Up to `seen` the first tile's maxima stand for all: no
    score is below what they allow, and of those above them float32 and bfloat16 hold 2^127 times
    as much. A block with a row that comes near it starts again, with running maxima.
    """
    m = tl.full([BM], HIDDEN, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    again = lo
    if V.dtype.element_ty != tl.float16:  # which holds 2^16
        if lo < seen:
            m, norm, acc = _tile(q, K, V, lo, num_keys, k_t, v_t, pos, num_keys, m, norm, acc,
                                 scale, False, BN, D, PRECISION)  # fmt: skip
        norms = tl.zeros([BM, LANES], tl.float32)
        for n in range(lo + BN, seen, BN):
            _, k, v = load_keys(K, V, n, num_keys, k_t, v_t, False, BN, D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(s * scale - m[:, None])
            norms += tl.sum(tl.reshape(p, [BM, BN // LANES, LANES]), 1)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        norm += tl.sum(norms, 1)
        held = tl.max(norm, 0) < 1.0e18
        again = tl.where(held, tl.maximum(lo, seen), lo)
        m, norm = tl.where(held, m, HIDDEN), tl.where(held, norm, 0.0)
        acc = tl.where(held, acc, 0.0)
    for n in range(again, seen, BN):
        m, norm, acc = _tile(q, K, V, n, num_keys, k_t, v_t, pos, num_keys, m, norm, acc, scale,
                             False, BN, D, PRECISION)  # fmt: skip
    for n in range(seen, hi, BN):
        m, norm, acc = _tile(q, K, V, n, num_keys, k_t, v_t, pos, num_keys, m, norm, acc, scale,
                             True, BN, D, PRECISION)  # fmt: skip
    return m, norm, acc


@triton.jit
def attend_band(q, K, V, first, last, num_keys, k_t, v_t, pos, window, scale, SINKS: tl.constexpr,
    BM: tl.constexpr,
                BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Softmax over the sinks and the hull of the windows of queries at positions first .. last.

    As `attend_keys`.
    """
    m = tl.full([BM], HIDDEN, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    lo, sunk = band_start(first, window, SINKS, BN)
    for x in range(lo - sunk, last + 1, BN):
        n = band_tile(x, lo, sunk, SINKS)
        m, norm, acc = _tile(q, K, V, n, num_keys, k_t, v_t, pos, window, m, norm, acc, scale,
                             True, BN, D, PRECISION, SINKS)  # fmt: skip
    return m, norm, acc


@triton.jit
def full_kernel(
    Q, K, V, Out, Lse, Partial, PartialLse, Order, Before, Starts, Items, Counters,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, H, GROUP, UNIT, T, NB, num_keys,
    start, scale, programs,
    STARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Full attention: programs stay resident and take items off the list, longest first.

    The next two are fetched ahead.
    """
    follow()
    d, r = tl.arange(0, D), tl.arange(0, BM)
    total = tl.load(Counters)
    item = tl.program_id(0)
    following = item + programs
    while item < total:
        after = tl.atomic_add(Counters + 1, 1) + 2 * programs
        j, record = item % UNIT, Items + item // UNIT * 8
        u, i, lo = tl.load(record), tl.load(record + 1), tl.load(record + 2)
        b, h = u // (H // UNIT), u % (H // UNIT) * UNIT + j
        hi, seen, part = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
        begin = start
        if STARTS:
            begin = tl.load(Starts + b).to(tl.int32)
        count = tl.load(Before + u * 3 * (NB + 1) + NB)
        real = i * BM + r < count
        t = tl.load(Order + u * 3 * T + i * BM + r, mask=real, other=0)
        pos = t + begin
        row, head = b.to(tl.int64), h.to(tl.int64)
        q = tl.load(Q + row * q_b + head * q_h + t[:, None].to(tl.int64) * q_t + d[None, :])
        Kh = K + row * k_b + head // GROUP * k_h
        Vh = V + row * v_b + head // GROUP * v_h
        m, norm, acc = attend_keys(
            q, Kh, Vh, lo, seen, hi, num_keys, k_t, v_t, pos, scale, BM, BN, D, PRECISION
        )
        acc = acc / tl.maximum(norm, 1e-30)[:, None]
        lse = m + tl.log2(norm)
        if part < 0:
            at = Out + row * o_b + head * o_h + t[:, None].to(tl.int64) * o_t + d[None, :]
            tl.store(at, acc.to(Out.dtype.element_ty), mask=real[:, None])
            tl.store(Lse + (row * H + head) * T + t, lse, mask=real)
        else:
            slot = (part * UNIT + j).to(tl.int64) * BM
            tl.store(
                Partial + (slot + r[:, None]) * D + d[None, :], acc.to(Partial.dtype.element_ty)
            )
            tl.store(PartialLse + slot + r, lse)
        item = following
        following = after


@triton.jit
def combine_kernel(
    Partial, PartialLse, Out, Lse, Order, Before, Parts, o_b, o_h, o_t, H, UNIT, T, NB, max_blocks,
    S: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Join the partial results of split blocks, ROWS rows at a time.

    Weighed by their normalisers, or summed (SUM).
    """
    follow()
    h, b = tl.program_id(0), tl.program_id(2)
    u = table_row(b, h, H, UNIT)
    count = tl.load(Before + u * 3 * (NB + 1) + NB)
    d = tl.arange(0, D)
    for x in range(tl.program_id(1), (count + ROWS - 1) // ROWS, tl.num_programs(1)):
        i, r = x * ROWS // BM, x * ROWS + tl.arange(0, ROWS)
        parts = Parts + (u * max_blocks + i) * (S + 1)
        number = tl.load(parts)
        if number > 1:
            real = r < count
            t = tl.load(Order + u * 3 * T + r, mask=real, other=0)
            m = tl.full([ROWS], HIDDEN, tl.float32)
            norm = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, D], tl.float32)
            for s in tl.range(number, num_stages=3):  # the next two are on their way
                at = (tl.load(parts + 1 + s) * UNIT + h % UNIT).to(tl.int64) * BM + r - i * BM
                value = tl.load(Partial + at[:, None] * D + d[None, :]).to(tl.float32)
                if SUM:
                    acc += value
                else:
                    lse = tl.load(PartialLse + at)
                    m_new = tl.maximum(m, lse)
                    old, new = tl.exp2(m - m_new), tl.exp2(lse - m_new)
                    acc = acc * old[:, None] + value * new[:, None]
                    norm = norm * old + new
                    m = m_new
            if not SUM:
                acc = acc / norm[:, None]
                tl.store(Lse + (b.to(tl.int64) * H + h) * T + t, m + tl.log2(norm), mask=real)
            at_out = (
                Out
                + b.to(tl.int64) * o_b
                + h.to(tl.int64) * o_h
                + t[:, None].to(tl.int64) * o_t
                + d[None, :]
            )
            tl.store(at_out, acc.to(Out.dtype.element_ty), mask=real[:, None])


@triton.jit
def local_kernel(
    Q, K, V, Out, Lse, Order, Before, Starts, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b,
    o_h, o_t,
    H, GROUP, UNIT, T, NB, num_keys, start, window, scale, SINKS: tl.constexpr,
    SORTED: tl.constexpr, STARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Windowed attention of a block of (sorted) local queries.

    It goes over the sinks and the hull of their windows.
    """
    follow()
    h, i, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    u = table_row(b, h, H, UNIT)
    if i * BM >= count_rows(Before, u, 2, T, NB, SORTED):
        return
    begin = start
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    t, real, first, last = gather_rows(Order, Before, u, 2, i, T, NB, SORTED, BM)
    pos, d = t + begin, tl.arange(0, D)
    q = tl.load(Q + b * q_b + h * q_h + t[:, None].to(tl.int64) * q_t + d[None, :])
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    m, norm, acc = attend_band(q, K, V, first + begin, last + begin, num_keys, k_t, v_t, pos,
        window, scale, SINKS, BM, BN, D,
                               PRECISION)  # fmt: skip
    at = Out + b * o_b + h * o_h + t[:, None].to(tl.int64) * o_t + d[None, :]
    tl.store(at, (acc / norm[:, None]).to(Out.dtype.element_ty), mask=real[:, None])
    tl.store(Lse + (b * H + h) * T + t, m + tl.log2(norm), mask=real)
