# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of hard routing that sort nothing: one launch or two forward, one backward.

A block of neighbouring queries holds rows of every kind. Full and local attention share scores and
differ by what a row sees; a linear row takes the product of its features in place of the weight.
Each row has one kind, so that weighted sums are one product whatever the kinds are:

    w_ts = softmax weight, or phi(q_t) . phi(k_s)        out_t = sum_s w_ts v_s / sum_s w_ts

That is half as much again as full attention over all keys, without any launch before it: for texts
so short that launches are the cost. Where a block of queries sees more keys than a segment, each of
its programs takes one segment, and another launch joins them: a short text has too few blocks to
keep a device busy, and what it takes is the longest chain of tiles. `Lse` is as in `forward`.
"""

import triton
import triton.language as tl

from bayes_router.attention.kernels.triton.launch import follow
from bayes_router.attention.kernels.triton.rows import (
    EPSILON,
    HIDDEN,
    LANES,
    load_rows,
    phi,
    reach_of,
    sees,
)

NOBODY = tl.constexpr(-2)  # the route of padding


@triton.jit
def _kinds(Route, t, real, r_t, full, linear, local, window):
    """Which rows are softmax and which linear, and how many keys back each sees."""
    choice = tl.load(Route + t.to(tl.int64) * r_t, mask=real, other=NOBODY)
    soft = real & ((choice == full) | (choice == local))
    return choice, soft, real & (choice == linear), tl.where(choice == local, window, 2147483647)


@triton.jit
def _scores(
    q, feature, K, V, PlainK, n0, num_keys, k_t, v_t, pk_t, pos, reach, SINKS: tl.constexpr,
    SAME: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Values of keys n0 and on, each row's own kind of product with the keys, what a row sees.

    q is zero in the linear rows and `feature` in all others, so that both products are one sum.
    """
    n = n0 + tl.arange(0, BN)
    k, v = load_rows(K, n, n < num_keys, k_t, D), load_rows(V, n, n < num_keys, v_t, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    y = k if SAME else load_rows(PlainK, n, n < num_keys, pk_t, D)
    s = tl.dot(feature, tl.trans(phi(y.to(tl.float32)).to(k.dtype)), s, input_precision=PRECISION)
    seen = sees(pos[:, None], n[None, :], reach_of(n[None, :], reach[:, None], SINKS))
    return v, s, seen


@triton.jit
def _write(Out, Lse, o_t, t, T, m, norm, acc, soft, linear_row, KEEP: tl.constexpr,
           D: tl.constexpr):  # fmt: skip
    """Finished rows, zero where no expert here takes them; KEEP: their normalisers."""
    norm = tl.where(soft | linear_row, norm, 1.0)
    acc = tl.where((soft | linear_row)[:, None], acc, 0.0)
    norm = tl.where(linear_row, norm + EPSILON, norm)
    at = Out + t[:, None].to(tl.int64) * o_t + tl.arange(0, D)[None, :]
    tl.store(at, (acc / norm[:, None]).to(Out.dtype.element_ty), mask=(t < T)[:, None])
    if KEEP:
        tl.store(Lse + t, tl.where(linear_row, norm, m + tl.log2(norm)), mask=t < T)


@triton.jit
def _keys_end(Lengths, Starts, b, i, T, start, PADDED: tl.constexpr, STARTS: tl.constexpr,
              BM: tl.constexpr):  # fmt: skip
    """Real queries of row b, the position of its first, the end of the keys that block i sees."""
    length, begin = T, start
    if PADDED:
        length = tl.load(Lengths + b).to(tl.int32)
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    return length, begin, tl.minimum(i * BM + BM, length) + begin


@triton.jit(debug=True)  # keeps the assertion: a route out of range must not pass silently
def mixed_kernel(
    Q, K, V, PlainQ, PlainK, Out, Lse, Partial, PartialNorm, Route, Lengths, Starts, q_b, q_h, q_t,
    k_b, k_h, k_t, v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t, r_b, r_t, r_r,
    full, linear, local, num_experts, H, GROUP, UNIT, T, num_keys, start, window, scale, segment,
    split,
    PADDED: tl.constexpr, STARTS: tl.constexpr, SINKS: tl.constexpr, SAME: tl.constexpr,
    KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: a query head, one of `split` segments of a block of queries, a row of the batch.

    The last block comes first. SAME: plain queries and keys are the rotated ones; KEEP: normalisers
    are written, too. Of several segments each leaves means in Partial, maxima and sums of weights
    in PartialNorm: `mixed_join_kernel`.
    """
    follow()
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    x = tl.num_programs(1) - 1 - tl.program_id(1)
    i, lo = x // split, x % split * segment
    length, begin, end = _keys_end(Lengths, Starts, b, i, T, start, PADDED, STARTS, BM)
    if (lo > 0) & (lo >= end):
        return
    hi = tl.minimum(end, lo + segment)
    hk, r, d = h // GROUP, tl.arange(0, BM), tl.arange(0, D)
    t = i * BM + r
    Route += b * r_b + h // UNIT * r_r
    choice, soft, linear_row, reach = _kinds(Route, t, t < length, r_t, full, linear, local, window)
    wrong = (t < length) & ((choice < 0) | (choice >= num_experts))
    tl.device_assert(tl.sum(wrong.to(tl.int32), 0) == 0, "route out of range")
    pos = t + begin
    q = load_rows(Q + b * q_b + h * q_h, t, t < T, q_t, D)
    if SAME:
        y = q.to(tl.float32)
    else:
        y = load_rows(PlainQ + b * pq_b + h * pq_h, t, t < T, pq_t, D).to(tl.float32)
    feature = tl.where(linear_row[:, None], phi(y), 0.0).to(q.dtype)
    q = tl.where(linear_row[:, None], 0.0, q.to(tl.float32)).to(q.dtype)
    K += b * k_b + hk * k_h
    V += b * v_b + hk * v_h
    PlainK += b * pk_b + hk * pk_h
    again = lo
    m = tl.full([BM], HIDDEN, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    # the score of a query's own key stands for all maxima; what may not is as in `attend_keys`
    if V.dtype.element_ty != tl.float16:
        own = load_rows(K, pos, pos < num_keys, k_t, D)
        top = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * scale
        norms = tl.zeros([BM, LANES], tl.float32)
        for n0 in range(lo, hi, BN):
            v, s, seen = _scores(q, feature, K, V, PlainK, n0, num_keys, k_t, v_t, pk_t, pos,
                                 reach, SINKS, SAME, BN, D, PRECISION)  # fmt: skip
            p = tl.where(linear_row[:, None], s, tl.exp2(s * scale - top[:, None]))
            p = tl.where(seen, p, 0.0)
            norms += tl.sum(tl.reshape(p, [BM, BN // LANES, LANES]), 1)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        norm = tl.sum(norms, 1)
        held = tl.max(tl.where(soft, norm, 0.0), 0) < 1.0e18
        again = tl.where(held, hi, lo)
        m, norm = tl.where(held, top, HIDDEN), tl.where(held, norm, 0.0)
        acc = tl.where(held, acc, 0.0)
    for n0 in range(again, hi, BN):
        v, s, seen = _scores(q, feature, K, V, PlainK, n0, num_keys, k_t, v_t, pk_t, pos, reach,
                             SINKS, SAME, BN, D, PRECISION)  # fmt: skip
        score = tl.where(seen & soft[:, None], s * scale, -float("inf"))
        m_new = tl.maximum(m, tl.max(score, 1))
        fade = tl.exp2(m - m_new)
        p = tl.where(linear_row[:, None] & seen, s, tl.exp2(score - m_new[:, None]))
        norm = norm * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        m = m_new
    if end <= segment:
        _write(Out + b * o_b + h * o_h, Lse + (b * H + h) * T, o_t, t, T, m, norm, acc, soft,
               linear_row, KEEP, D)  # fmt: skip
    else:
        slot = ((b * H + h) * tl.num_programs(1) + x) * BM
        mean = (acc / tl.maximum(norm, 1e-30)[:, None]).to(Partial.dtype.element_ty)
        tl.store(Partial + (slot + r)[:, None] * D + d[None, :], mean)
        tl.store(PartialNorm + 2 * slot + r, tl.where(linear_row, 0.0, m))
        tl.store(PartialNorm + 2 * slot + BM + r, norm)


@triton.jit
def mixed_join_kernel(
    Out, Lse, Partial, PartialNorm, Route, Lengths, Starts, o_b, o_h, o_t, r_b, r_t, r_r, full,
    linear, local, H, UNIT, T, start, segment, split,
    PADDED: tl.constexpr, STARTS: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Join the segments of ROWS queries; program: a query head, these rows, a row of the batch."""
    follow()
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * ROWS // BM
    length, begin, end = _keys_end(Lengths, Starts, b, i, T, start, PADDED, STARTS, BM)
    if end <= segment:
        return
    Route += b * r_b + h // UNIT * r_r
    _, soft, linear_row, _ = _kinds(Route, t, t < length, r_t, full, linear, local, 1)
    first = ((b * H + h) * tl.cdiv(T, BM) + i) * split * BM
    r, d = t - i * BM, tl.arange(0, D)
    m = tl.full([ROWS], HIDDEN, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for s in tl.range((end + segment - 1) // segment, num_stages=3):  # the next two on their way
        slot = first + s * BM
        mean = tl.load(Partial + (slot + r)[:, None] * D + d[None, :]).to(tl.float32)
        highest = tl.load(PartialNorm + 2 * slot + r)
        m_new = tl.maximum(m, highest)
        old = tl.exp2(m - m_new)
        new = tl.exp2(highest - m_new) * tl.load(PartialNorm + 2 * slot + BM + r)
        acc = acc * old[:, None] + mean * new[:, None]
        norm = norm * old + new
        m = m_new
    _write(Out + b * o_b + h * o_h, Lse + (b * H + h) * T, o_t, t, T, m, norm, acc, soft,
           linear_row, KEEP, D)  # fmt: skip


@triton.jit
def _queries(
    Q, K, V, PlainQ, PlainK, Out, DOut, Lse, DQ, DPlainQ, Route, q_b, q_h, q_t, k_b, k_h, k_t, v_b,
    v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t, e_b,
    e_h, e_t, r_b, r_t, r_r, full, linear, local, H, GROUP, UNIT, T, window, scale, length, h, i, b,
    SINKS: tl.constexpr, SAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of block i of queries. SAME: DQ has all rows; else DPlainQ has the linear ones."""
    hk, t, d = h // GROUP, i * BM + tl.arange(0, BM), tl.arange(0, D)
    real = t < length
    Route += b * r_b + h // UNIT * r_r
    _, soft, linear_row, reach = _kinds(Route, t, real, r_t, full, linear, local, window)
    q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
    do = load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
    out = load_rows(Out + b * o_b + h * o_h, t, real, o_t, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(Lse + (b * H + h) * T + t, mask=real, other=1.0)
    K += b * k_b + hk * k_h
    V += b * v_b + hk * v_h
    PlainK += b * pk_b + hk * pk_h
    dq = tl.zeros([BM, D], tl.float32)
    for n0 in range(0, tl.minimum(i * BM + BM, length), BN):
        n = n0 + tl.arange(0, BN)
        k, v = load_rows(K, n, n < T, k_t, D), load_rows(V, n, n < T, v_t, D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        y = k if SAME else load_rows(PlainK, n, n < T, pk_t, D)
        feature = phi(y.to(tl.float32)).to(k.dtype)
        seen = sees(t[:, None], n[None, :], reach_of(n[None, :], reach[:, None], SINKS))
        ds = tl.where(seen & soft[:, None], tl.exp2(s * scale - lse[:, None]) * dp, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        da = tl.where(seen & linear_row[:, None], dp, 0.0)
        dq = tl.dot(da.to(k.dtype), feature, dq, input_precision=PRECISION)
    if SAME:
        x = q.to(tl.float32)
    else:
        x = load_rows(PlainQ + b * pq_b + h * pq_h, t, real, pq_t, D).to(tl.float32)
    slope = tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0))) / lse[:, None]
    at = DQ + b * d_b + h * d_h + t[:, None].to(tl.int64) * d_t + d[None, :]
    mine = dq * (scale * 0.6931471805599453)  # scale is 1 / sqrt(Dh) in base 2
    other = tl.where(linear_row[:, None], dq * slope, 0.0)
    if SAME:
        mine = tl.where(linear_row[:, None], other, mine)
    else:
        mine = tl.where(linear_row[:, None], 0.0, mine)
        plain = DPlainQ + b * e_b + h * e_h + t[:, None].to(tl.int64) * e_t + d[None, :]
        tl.store(plain, other.to(DQ.dtype.element_ty), mask=(t < T)[:, None])
    tl.store(at, mine.to(DQ.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit
def _keys(
    Q, K, V, PlainQ, PlainK, Out, DOut, Lse, DK, DPlainK, DV, Route, q_b, q_h, q_t, k_b, k_h, k_t,
    v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t,
    e_b, e_h, e_t, f_b, f_h, f_t, r_b, r_t, r_r, full, linear, local, H, GROUP, UNIT, T, window,
    scale, length, hk, j, b,
    SINKS: tl.constexpr, SAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of block j of keys and values, from the queries after it."""
    n0 = j * BN
    n, d = n0 + tl.arange(0, BN), tl.arange(0, D)
    inside = n < T
    k = load_rows(K + b * k_b + hk * k_h, n, inside, k_t, D)
    v = load_rows(V + b * v_b + hk * v_h, n, inside, v_t, D)
    if SAME:
        y = k.to(tl.float32)
    else:
        y = load_rows(PlainK + b * pk_b + hk * pk_h, n, inside, pk_t, D).to(tl.float32)
    feature = phi(y).to(k.dtype)
    # 1 / den would underflow in float16
    wide = tl.bfloat16 if Q.dtype.element_ty == tl.float16 else Q.dtype.element_ty
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    dphi = tl.zeros([BN, D], tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        Qh, DOh, Oh = Q + b * q_b + h * q_h, DOut + b * g_b + h * g_h, Out + b * o_b + h * o_h
        Ph, Rh, row = PlainQ + b * pq_b + h * pq_h, Route + b * r_b + h // UNIT * r_r, b * H + h
        for t0 in range(n0 // BM * BM, length, BM):
            t = t0 + tl.arange(0, BM)
            real = t < length
            _, soft, linear_row, reach = _kinds(Rh, t, real, r_t, full, linear, local, window)
            q = load_rows(Qh, t, real, q_t, D)
            do = load_rows(DOh, t, real, g_t, D)
            lse = tl.load(Lse + row * T + t, mask=real, other=1.0)
            out = load_rows(Oh, t, real, o_t, D)
            delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
            x = q if SAME else load_rows(Ph, t, real, pq_t, D)
            query = phi(x.to(tl.float32)).to(q.dtype)
            seen = sees(t[None, :], n[:, None], reach_of(n[:, None], reach[None, :], SINKS))
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
            a = tl.dot(feature, tl.trans(query), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :]
            p = tl.where(seen & soft[None, :], tl.exp2(s * scale - lse[None, :]), 0.0)
            share = tl.where(seen & linear_row[None, :], 1.0 / lse[None, :], 0.0)
            weight = p + a * share
            dv = tl.dot(weight.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision=PRECISION)
            da = (share * dp).to(wide)
            dphi = tl.dot(da, query.to(wide), dphi, input_precision=PRECISION)
    dk *= scale * 0.6931471805599453
    dphi *= tl.where(y > 0, 1.0, tl.exp(tl.minimum(y, 0.0)))
    if SAME:
        dk += dphi
    else:
        at = DPlainK + b * e_b + hk * e_h + n[:, None].to(tl.int64) * e_t + d[None, :]
        tl.store(at, dphi.to(DK.dtype.element_ty), mask=inside[:, None])
    at = DK + b * d_b + hk * d_h + n[:, None].to(tl.int64) * d_t + d[None, :]
    tl.store(at, dk.to(DK.dtype.element_ty), mask=inside[:, None])
    at = DV + b * f_b + hk * f_h + n[:, None].to(tl.int64) * f_t + d[None, :]
    tl.store(at, dv.to(DV.dtype.element_ty), mask=inside[:, None])


@triton.jit
def mixed_backward_kernel(
    Q, K, V, PlainQ, PlainK, Out, DOut, Lse, DQ, DPlainQ, DK, DPlainK, DV, Route, Lengths,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t,
    g_b, g_h, g_t, dq_b, dq_h, dq_t, dpq_b, dpq_h, dpq_t, dk_b, dk_h, dk_t, dpk_b, dpk_h, dpk_t,
    dv_b, dv_h, dv_t, r_b, r_t, r_r, full, linear, local, H, GROUP, UNIT, T, window, scale,
    PADDED: tl.constexpr, SINKS: tl.constexpr, SAME: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, KM: tl.constexpr, KN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients; program: a block of one key head's keys or of one head's queries, a row.

    Neither needs the other. First come the keys, of which the first see most queries (tiles of KM
    queries and KN keys), then the queries, of which the last see most keys (BM and BN).
    """
    follow()
    x, b, HK = tl.program_id(0), tl.program_id(1).to(tl.int64), H // GROUP
    of_keys = HK * tl.cdiv(T, KN)
    length = T
    if PADDED:
        length = tl.load(Lengths + b).to(tl.int32)
    if x < of_keys:
        _keys(
            Q, K, V, PlainQ, PlainK, Out, DOut, Lse, DK, DPlainK, DV, Route, q_b, q_h, q_t, k_b,
            k_h, k_t, v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t, g_b, g_h,
            g_t, dk_b, dk_h, dk_t, dpk_b, dpk_h, dpk_t, dv_b, dv_h, dv_t, r_b, r_t, r_r, full,
            linear, local, H, GROUP, UNIT, T, window, scale, length, (x % HK).to(tl.int64), x // HK,
            b, SINKS, SAME, KM, KN, D, PRECISION,
        )  # fmt: skip
    else:
        y = x - of_keys
        _queries(
            Q, K, V, PlainQ, PlainK, Out, DOut, Lse, DQ, DPlainQ, Route, q_b, q_h, q_t, k_b, k_h,
            k_t, v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t, g_b, g_h, g_t,
            dq_b, dq_h, dq_t, dpq_b, dpq_h, dpq_t, r_b, r_t, r_r, full, linear, local, H, GROUP,
            UNIT, T, window, scale, length, (y % H).to(tl.int64), tl.cdiv(T, BM) - 1 - y // H, b,
            SINKS, SAME, BM, BN, D, PRECISION,
        )  # fmt: skip
