# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of the routed forward pass; `launch_forward` launches them.

Each program takes a block of queries of one kind, gathered by the order of `plan`, so that its rows
cost the same. Softmax is taken online in base 2. Besides the output each row leaves `Lse`: log2 of
its softmax normaliser, or its denominator under linear attention; the backward pass reads it.
"""

import triton
import triton.language as tl

from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.eager import chunks

EPSILON = tl.constexpr(chunks.EPSILON)
LOG2_E = tl.constexpr(capability.LOG2_E)
# below every score, and finite: a row without visible keys gets weight 0, not NaN
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def phi(x):
    """The feature map elu(x) + 1, in float32."""
    return tl.where(x > 0, x + 1, tl.exp2(tl.minimum(x, 0.0) * LOG2_E))


@triton.jit
def load_rows(X, t, real, x_t, D: tl.constexpr):
    """Rows t of X [T, D], zero where not real."""
    d = tl.arange(0, D)
    return tl.load(X + t[:, None].to(tl.int64) * x_t + d[None, :], mask=real[:, None], other=0.0)


@triton.jit
def table_row(b, h, H, UNIT):
    """Row of the tables of `plan` that query head h of row b reads.

    That of its routing unit of UNIT heads.
    """
    return b * (H // UNIT) + h // UNIT


@triton.jit
def count_rows(Before, u, kind, T, NB, SORTED: tl.constexpr):
    """How many tokens of row u of the tables are of this kind; all of them if not SORTED."""
    return tl.load(Before + (u * 3 + kind) * (NB + 1) + NB) if SORTED else tl.cast(T, tl.int32)


@triton.jit
def rows_before(Before, u, kind, token, T, NB, SORTED: tl.constexpr):
    """How many tokens of this kind stand before `token`.

    SORTED: before the last multiple of 64 up to it.
    """
    return (
        tl.load(Before + (u * 3 + kind) * (NB + 1) + tl.minimum(token // 64, NB))
        if SORTED
        else tl.minimum(token, T)
    )


@triton.jit
def nth_token(Order, u, kind, r, real, T, SORTED: tl.constexpr):
    """The r-th token of this kind; 0 where not real."""
    return (
        tl.load(Order + (u * 3 + kind) * T + r, mask=real, other=0)
        if SORTED
        else tl.where(real, r, 0)
    )


@triton.jit
def gather_rows(Order, Before, u, kind, block, T, NB, SORTED: tl.constexpr, BM: tl.constexpr):
    """Tokens of a block of one kind [BM], which of them exist, and the first and last."""
    count = count_rows(Before, u, kind, T, NB, SORTED)
    r = block * BM + tl.arange(0, BM)
    real = r < count
    t = nth_token(Order, u, kind, r, real, T, SORTED)
    return t, real, tl.min(tl.where(real, t, 2147483647), 0), tl.max(t, 0)


@triton.jit
def sees(pos, n, reach):
    """Whether a query at `pos` sees key n, no more than `reach` keys back, itself included.

    One unsigned comparison.
    """
    # an argument equal to 1 is a constexpr
    return (pos - n).to(tl.uint32, bitcast=True) < tl.cast(reach, tl.uint32)


@triton.jit
def reach_of(n, window, SINKS: tl.constexpr):
    """How many keys back key n is still seen by a local query, itself included.

    A sink from everywhere.
    """
    return tl.where(n < SINKS, 2147483647, window) if SINKS else window


@triton.jit
def band_start(first, window, SINKS: tl.constexpr, BN: tl.constexpr):
    """Where the tiles of keys in the window of a query at `first` start.

    And how many keys of tiles of sinks come before them.
    """
    lo = tl.maximum(first - window + 1, 0) // BN * BN
    return lo, tl.minimum((SINKS + BN - 1) // BN * BN, lo) if SINKS else 0


@triton.jit
def band_tile(x, lo, sunk, SINKS: tl.constexpr):
    """First key of the tile at x, lo - sunk and on: first those of the sinks, then from `lo`."""
    return tl.where(x < lo, x - lo + sunk, x) if SINKS else x


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
def load_keys(K, V, n0, num_keys, k_t, v_t, MASKED: tl.constexpr, BN: tl.constexpr,
              D: tl.constexpr):  # fmt: skip
    """Positions n0 .. n0 + BN, their keys and their values; MASKED: zero from num_keys on."""
    n = n0 + tl.arange(0, BN)
    d = tl.arange(0, D)
    at_k, at_v = n[:, None] * k_t + d[None, :], n[:, None] * v_t + d[None, :]
    if MASKED:
        k = tl.load(K + at_k, mask=n[:, None] < num_keys, other=0.0)
        v = tl.load(V + at_v, mask=n[:, None] < num_keys, other=0.0)
    else:
        k = tl.load(K + at_k)
        v = tl.load(V + at_v)
    return n, k, v


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

    (maxima, normalisers, weighted sums).
    """
    m = tl.full([BM], HIDDEN, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n in range(lo, seen, BN):
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
            for s in range(number):
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
