# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of hard routing that sort nothing: one launch forward, two backward.

A block of neighbouring queries holds rows of every kind. Full and local attention share scores and
differ by what a row sees; a linear row takes the product of its features in place of the weight.
Each row has one kind, so that weighted sums are one product whatever the kinds are:

    w_ts = softmax weight, or phi(q_t) . phi(k_s)        out_t = sum_s w_ts v_s / sum_s w_ts

That is half as much again as full attention over all keys, without any launch before it: for texts
so short that launches are the cost. `Lse` is as in `forward`.
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
    """Values of keys n0 and on, their raw scores, products of features, and whether a row sees."""
    n = n0 + tl.arange(0, BN)
    k, v = load_rows(K, n, n < num_keys, k_t, D), load_rows(V, n, n < num_keys, v_t, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    y = k if SAME else load_rows(PlainK, n, n < num_keys, pk_t, D)
    a = tl.dot(feature, tl.trans(phi(y.to(tl.float32)).to(k.dtype)), input_precision=PRECISION)
    seen = sees(pos[:, None], n[None, :], reach_of(n[None, :], reach[:, None], SINKS))
    return v, s, a, seen


@triton.jit(debug=True)  # keeps the assertion: a route out of range must not pass silently
def mixed_kernel(
    Q, K, V, PlainQ, PlainK, Out, Lse, Route, Lengths, Starts, q_b, q_h, q_t, k_b, k_h, k_t, v_b,
    v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t, r_b, r_t, r_r, full, linear,
    local, num_experts, H, GROUP, UNIT, T, num_keys, start, window, scale,
    PADDED: tl.constexpr, STARTS: tl.constexpr, SINKS: tl.constexpr, SAME: tl.constexpr,
    KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: a query head, a block of queries (the last first), a row of the batch.

    SAME: plain queries and keys are the rotated ones; KEEP: normalisers are written, too.
    """
    follow()
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.num_programs(1) - 1 - tl.program_id(1)
    hk, t, d = h // GROUP, i * BM + tl.arange(0, BM), tl.arange(0, D)
    length, begin = T, start
    if PADDED:
        length = tl.load(Lengths + b).to(tl.int32)
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    Route += b * r_b + h // UNIT * r_r
    choice, soft, linear_row, reach = _kinds(Route, t, t < length, r_t, full, linear, local, window)
    wrong = (t < length) & ((choice < 0) | (choice >= num_experts))
    tl.device_assert(tl.sum(wrong.to(tl.int32), 0) == 0, "route out of range")
    pos = t + begin
    q = load_rows(Q + b * q_b + h * q_h, t, t < T, q_t, D)
    if SAME:
        x = q.to(tl.float32)
    else:
        x = load_rows(PlainQ + b * pq_b + h * pq_h, t, t < T, pq_t, D).to(tl.float32)
    feature = phi(x).to(q.dtype)
    K += b * k_b + hk * k_h
    V += b * v_b + hk * v_h
    PlainK += b * pk_b + hk * pk_h
    end, again = tl.minimum(i * BM + BM, length) + begin, 0
    m = tl.full([BM], HIDDEN, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    # the score of a query's own key stands for all maxima; what may not is as in `attend_keys`
    if V.dtype.element_ty != tl.float16:
        own = load_rows(K, pos, pos < num_keys, k_t, D)
        top = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * scale
        norms = tl.zeros([BM, LANES], tl.float32)
        for n0 in range(0, end, BN):
            v, s, a, seen = _scores(q, feature, K, V, PlainK, n0, num_keys, k_t, v_t, pk_t, pos,
                                    reach, SINKS, SAME, BN, D, PRECISION)  # fmt: skip
            p = tl.where(linear_row[:, None], a, tl.exp2(s * scale - top[:, None]))
            p = tl.where(seen, p, 0.0)
            norms += tl.sum(tl.reshape(p, [BM, BN // LANES, LANES]), 1)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        norm = tl.sum(norms, 1)
        held = tl.max(tl.where(soft, norm, 0.0), 0) < 1.0e18
        again = tl.where(held, end, 0)
        m, norm = tl.where(held, top, HIDDEN), tl.where(held, norm, 0.0)
        acc = tl.where(held, acc, 0.0)
    for n0 in range(again, end, BN):
        v, s, a, seen = _scores(q, feature, K, V, PlainK, n0, num_keys, k_t, v_t, pk_t, pos, reach,
                                SINKS, SAME, BN, D, PRECISION)  # fmt: skip
        s = tl.where(seen & soft[:, None], s * scale, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        fade = tl.exp2(m - m_new)
        p = tl.where(linear_row[:, None] & seen, a, tl.exp2(s - m_new[:, None]))
        norm = norm * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        m = m_new
    norm = tl.where(soft | linear_row, norm, 1.0)
    acc = tl.where((soft | linear_row)[:, None], acc, 0.0)
    norm = tl.where(linear_row, norm + EPSILON, norm)
    at = Out + b * o_b + h * o_h + t[:, None].to(tl.int64) * o_t + d[None, :]
    tl.store(at, (acc / norm[:, None]).to(Out.dtype.element_ty), mask=(t < T)[:, None])
    if KEEP:
        tl.store(Lse + (b * H + h) * T + t, tl.where(linear_row, norm, m + tl.log2(norm)),
                 mask=t < T)  # fmt: skip


@triton.jit
def mixed_dq_kernel(
    Q, K, V, PlainQ, PlainK, Out, DOut, Lse, Delta, DQ, DPlainQ, Route, Lengths, q_b, q_h, q_t, k_b,
    k_h, k_t, v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t, g_b, g_h, g_t, d_b,
    d_h, d_t, e_b, e_h, e_t, r_b, r_t, r_r, full, linear, local, H, GROUP, UNIT, T, window, scale,
    PADDED: tl.constexpr, SINKS: tl.constexpr, SAME: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, and Delta [B, H, T], sum(out * dout) of each.

    SAME: DQ has all rows; else DPlainQ has the linear ones.
    """
    follow()
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.num_programs(1) - 1 - tl.program_id(1)
    hk, t, d = h // GROUP, i * BM + tl.arange(0, BM), tl.arange(0, D)
    length = T
    if PADDED:
        length = tl.load(Lengths + b).to(tl.int32)
    real = t < length
    Route += b * r_b + h // UNIT * r_r
    _, soft, linear_row, reach = _kinds(Route, t, real, r_t, full, linear, local, window)
    q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
    do = load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
    out = load_rows(Out + b * o_b + h * o_h, t, real, o_t, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + (b * H + h) * T + t, delta, mask=real)
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
def mixed_dkv_kernel(
    Q, K, V, PlainQ, PlainK, DOut, Lse, Delta, DK, DPlainK, DV, Route, Lengths, q_b, q_h, q_t, k_b,
    k_h, k_t, v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, g_b, g_h, g_t, d_b, d_h, d_t, e_b,
    e_h, e_t, f_b, f_h, f_t, r_b, r_t, r_r, full, linear, local, H, GROUP, UNIT, T, window, scale,
    PADDED: tl.constexpr, SINKS: tl.constexpr, SAME: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from the queries after it; the first block first."""
    follow()
    hk, j, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n0 = j * BN
    n, d = n0 + tl.arange(0, BN), tl.arange(0, D)
    length = T
    if PADDED:
        length = tl.load(Lengths + b).to(tl.int32)
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
        Qh, DOh = Q + b * q_b + h * q_h, DOut + b * g_b + h * g_h
        Ph, Rh, row = PlainQ + b * pq_b + h * pq_h, Route + b * r_b + h // UNIT * r_r, b * H + h
        for t0 in range(n0 // BM * BM, length, BM):
            t = t0 + tl.arange(0, BM)
            real = t < length
            _, soft, linear_row, reach = _kinds(Rh, t, real, r_t, full, linear, local, window)
            q = load_rows(Qh, t, real, q_t, D)
            do = load_rows(DOh, t, real, g_t, D)
            lse = tl.load(Lse + row * T + t, mask=real, other=1.0)
            delta = tl.load(Delta + row * T + t, mask=real, other=0.0)
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
