# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of the routed backward pass.

Nothing of size T x T is kept: scores are taken again from q, k and `Lse`.

With p the softmax weights, delta = sum(out * dout): ds = p (dout v^T - delta), dq = ds k, dk = ds^T
q, dv = p^T dout.
"""

import triton
import triton.language as tl

from bayes_router.attention.kernels.triton.launch import follow
from bayes_router.attention.kernels.triton.rows import (
    band_start,
    band_tile,
    count_rows,
    gather_rows,
    load_keys,
    load_rows,
    nth_token,
    reach_of,
    rows_before,
    sees,
    table_row,
)


@triton.jit
def _dq_tile(q, do, K, V, n0, num_keys, k_t, v_t, pos, reach, lse, delta, dq, scale,
    MASKED: tl.constexpr, BN: tl.constexpr,
             D: tl.constexpr, PRECISION: tl.constexpr, SINKS: tl.constexpr = 0):  # fmt: skip
    n, k, v = load_keys(K, V, n0, num_keys, k_t, v_t, MASKED, BN, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        p = tl.where(sees(pos[:, None], n[None, :], reach_of(n[None, :], reach, SINKS)), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def full_dq_kernel(
    Q, K, V, Out, DOut, Lse, SortedLse, SortedDelta, DQ, Partial, Order, Before, Items, Counters,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t, H, GROUP, UNIT, T, NB, scale, programs,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of full attention's queries, over the same work items as the forward pass.

    SortedLse and SortedDelta: see `dkv_kernel`.
    """
    follow()
    d, r = tl.arange(0, D), tl.arange(0, BM)
    total = tl.load(Counters)
    item = tl.program_id(0)
    following = item + programs
    while item < total:
        after = tl.atomic_add(Counters + 2, 1) + 2 * programs
        j, record = (item % UNIT).to(tl.int64), Items + item // UNIT * 8
        u, i, lo = tl.load(record).to(tl.int64), tl.load(record + 1), tl.load(record + 2)
        b, h = u // (H // UNIT), u % (H // UNIT) * UNIT + j
        hi, seen, part = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
        place = i * BM + r
        real = place < tl.load(Before + u * 3 * (NB + 1) + NB)
        t = tl.load(Order + u * 3 * T + place, mask=real, other=0)
        q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
        do = load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
        out = load_rows(Out + b * o_b + h * o_h, t, real, o_t, D)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        lse = tl.load(Lse + (b * H + h) * T + t, mask=real, other=float("inf"))
        tl.store(SortedDelta + (b * H + h) * T + place, delta, mask=real)
        tl.store(SortedLse + (b * H + h) * T + place, lse, mask=real)
        Kh, Vh = K + b * k_b + h // GROUP * k_h, V + b * v_b + h // GROUP * v_h
        dq = tl.zeros([BM, D], tl.float32)
        for n in range(lo, seen, BN):
            dq = _dq_tile(
                q, do, Kh, Vh, n, T, k_t, v_t, t, T, lse, delta, dq, scale, False, BN, D, PRECISION
            )
        for n in range(seen, hi, BN):
            dq = _dq_tile(
                q, do, Kh, Vh, n, T, k_t, v_t, t, T, lse, delta, dq, scale, True, BN, D, PRECISION
            )
        dq = dq * (scale * 0.6931471805599453)  # scale is 1 / sqrt(Dh) in base 2
        if part < 0:
            at = DQ + b * d_b + h * d_h + t[:, None].to(tl.int64) * d_t + d[None, :]
            tl.store(at, dq.to(DQ.dtype.element_ty), mask=real[:, None])
        else:
            at = Partial + ((part * UNIT + j) * BM + r[:, None]) * D + d[None, :]
            tl.store(at, dq.to(Partial.dtype.element_ty))
        item = following
        following = after


@triton.jit
def local_dq_kernel(
    Q, K, V, Out, DOut, Lse, SortedLse, SortedDelta, DQ, Order, Before, q_b, q_h, q_t, k_b, k_h,
    k_t, v_b, v_h, v_t,
    o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t, H, GROUP, UNIT, T, NB, window, scale,
    SINKS: tl.constexpr, SORTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of local attention's queries; SortedLse and SortedDelta: see `dkv_kernel`."""
    follow()
    h, i, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    u = table_row(b, h, H, UNIT)
    count = count_rows(Before, u, 2, T, NB, SORTED)
    if i * BM >= count:
        return
    t, real, first, last = gather_rows(Order, Before, u, 2, i, T, NB, SORTED, BM)
    q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
    do = load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
    out = load_rows(Out + b * o_b + h * o_h, t, real, o_t, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(Lse + (b * H + h) * T + t, mask=real, other=float("inf"))
    kept = (b * H + h) * T + T - count + i * BM + tl.arange(0, BM)
    tl.store(SortedDelta + kept, delta, mask=real)
    if SORTED:
        tl.store(SortedLse + kept, lse, mask=real)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    dq = tl.zeros([BM, D], tl.float32)
    lo, sunk = band_start(first, window, SINKS, BN)
    for x in range(lo - sunk, last + 1, BN):
        n = band_tile(x, lo, sunk, SINKS)
        dq = _dq_tile(
            q,
            do,
            K,
            V,
            n,
            T,
            k_t,
            v_t,
            t,
            window,
            lse,
            delta,
            dq,
            scale,
            True,
            BN,
            D,
            PRECISION,
            SINKS,
        )
    d = tl.arange(0, D)
    at = DQ + b * d_b + h * d_h + t[:, None].to(tl.int64) * d_t + d[None, :]
    tl.store(at, (dq * (scale * 0.6931471805599453)).to(DQ.dtype.element_ty), mask=real[:, None])


@triton.jit
def _dkv_rows(
    Q, DOut, Lse, Delta, Order, u, kind, T, r0, end, t, k, v, n, dk, dv, q_t, g_t, scale, reach,
    MASKED: tl.constexpr, SORTED: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
    SINKS: tl.constexpr = 0,
):  # fmt: skip
    """What a block of softmax queries adds to the gradients of a block of keys.

    It sees `reach` keys back. Its tokens t come with the call, and those of the next block are
    returned: the queries of a block are then on their way before their turn, which waiting for
    tokens first would prevent.
    """
    r = r0 + tl.arange(0, BM)
    real = r < end
    q = load_rows(Q, t, real, q_t, D)
    do = load_rows(DOut, t, real, g_t, D)
    following = nth_token(Order, u, kind, r + BM, r + BM < end, T, SORTED)
    lse = tl.load(Lse + r, mask=real, other=float("inf"))
    delta = tl.load(Delta + r, mask=real, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
    p = tl.exp2(s * scale - lse[None, :])
    if MASKED:
        pos = nth_token(Order, u, kind, r, real, T, SORTED)
        p = tl.where(sees(pos[None, :], n[:, None], reach_of(n[:, None], reach, SINKS)), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv, following


@triton.jit
def dkv_kernel(
    Q, K, V, DOut, SortedLse, SortedDelta, DK, DV, Order, Before, Counters, q_b, q_h, q_t, k_b, k_h,
    k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, H, GROUP, UNIT, T, NB, window, scale,
    SINKS: tl.constexpr, FULL: tl.constexpr, LOCAL: tl.constexpr, SORTED: tl.constexpr,
    ADD_K: tl.constexpr, ADD_V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from the full and local queries that see it.

    Blocks seen by most go first. ADD_K, ADD_V: they are added to what DK or DV holds. SortedLse and
    SortedDelta [B, H, T] have the normaliser and delta of each query: of full ones by their place
    in `Order`, from the first on; of local ones likewise, such that the last one's come last. Where
    there is full attention the items of its queries may be taken once more.
    """
    follow()
    hk, j, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n0 = j * BN
    n, d, rows = n0 + tl.arange(0, BN), tl.arange(0, D), tl.arange(0, BM)
    if FULL and hk + j + b == 0:
        tl.store(Counters + 2, 0)
    inside = n < T
    k = load_rows(K + b * k_b + hk * k_h, n, inside, k_t, D)
    v = load_rows(V + b * v_b + hk * v_h, n, inside, v_t, D)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        u = table_row(b, h, H, UNIT)
        Qh, DOh = Q + b * q_b + h * q_h, DOut + b * g_b + h * g_h
        Lh, Dh = SortedLse + (b * H + h) * T, SortedDelta + (b * H + h) * T
        if FULL:
            lo, end = (
                rows_before(Before, u, 0, n0, T, NB, SORTED),
                count_rows(Before, u, 0, T, NB, SORTED),
            )
            # from here on every query sees the whole block
            clear = rows_before(Before, u, 0, n0 + BN + 63, T, NB, SORTED)
            split = lo + (clear - lo + BM - 1) // BM * BM
            t = nth_token(Order, u, 0, lo + rows, lo + rows < end, T, SORTED)
            for r0 in range(lo, split, BM):
                dk, dv, t = _dkv_rows(Qh, DOh, Lh, Dh, Order, u, 0, T, r0, end, t, k, v, n, dk, dv,
                                      q_t, g_t, scale, T, True, SORTED, BM, D,
                                      PRECISION)  # fmt: skip
            for r0 in range(split, end, BM):
                dk, dv, t = _dkv_rows(Qh, DOh, Lh, Dh, Order, u, 0, T, r0, end, t, k, v, n, dk, dv,
                                      q_t, g_t, scale, T, False, SORTED, BM, D,
                                      PRECISION)  # fmt: skip
        if LOCAL:
            lo, end = (
                rows_before(Before, u, 2, n0, T, NB, SORTED),
                rows_before(Before, u, 2, n0 + BN + window + 62, T, NB, SORTED),
            )
            count = count_rows(Before, u, 2, T, NB, SORTED)
            if SINKS:  # every later query sees them
                end = tl.where(n0 < SINKS, count, end)
            Lh += T - count
            Dh += T - count
            t = nth_token(Order, u, 2, lo + rows, lo + rows < end, T, SORTED)
            for r0 in range(lo, end, BM):
                dk, dv, t = _dkv_rows(Qh, DOh, Lh, Dh, Order, u, 2, T, r0, end, t, k, v, n, dk, dv,
                                      q_t, g_t, scale, window, True, SORTED, BM, D, PRECISION,
                                      SINKS)  # fmt: skip
    dk = dk * (scale * 0.6931471805599453)
    at = DK + b * dk_b + hk * dk_h + n[:, None].to(tl.int64) * dk_t + d[None, :]
    if ADD_K:
        dk += tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(at, dk.to(DK.dtype.element_ty), mask=inside[:, None])
    at = DV + b * dv_b + hk * dv_h + n[:, None].to(tl.int64) * dv_t + d[None, :]
    if ADD_V:
        dv += tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(at, dv.to(DV.dtype.element_ty), mask=inside[:, None])
