# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of the routed backward pass. Nothing of size T x T is kept: scores are taken again from q, k and `Lse`.

With p the softmax weights, delta = sum(out * dout): ds = p (dout v^T - delta), dq = ds k, dk = ds^T q, dv = p^T dout. Linear
attention, out = N / den: with g = dout / den and gz = -delta / den, every pair (t, s) has the weight phi(q_t) phi(k_s) whose
gradient is g_t v_s + gz_t; what lies beyond a chunk goes through the state S, and in reverse through

    R = sum_t phi(q_t) g_t^T,  rz = sum_t phi(q_t) gz_t     over the linear queries after the chunk.
"""

import triton
import triton.language as tl

from bayes_router.attention.forward_triton import gather_rows, phi, sees


@triton.jit
def _load_rows(X, t, real, x_t, D: tl.constexpr):
    d = tl.arange(0, D)
    return tl.load(X + t[:, None].to(tl.int64) * x_t + d[None, :], mask=real[:, None], other=0.0)


@triton.jit
def _dq_tile(q, do, K, V, n0, num_keys, k_t, v_t, pos, reach, lse, delta, dq, scale, MASKED: tl.constexpr, BN: tl.constexpr,
             D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    n = n0 + tl.arange(0, BN)
    d = tl.arange(0, D)
    at_k, at_v = n[:, None] * k_t + d[None, :], n[:, None] * v_t + d[None, :]
    if MASKED:
        k = tl.load(K + at_k, mask=n[:, None] < num_keys, other=0.0)
        v = tl.load(V + at_v, mask=n[:, None] < num_keys, other=0.0)
    else:
        k = tl.load(K + at_k)
        v = tl.load(V + at_v)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        p = tl.where(sees(pos[:, None], n[None, :], reach), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def full_dq_kernel(
    Q, K, V, Out, DOut, Lse, Delta, DQ, Partial, Order, Before, Items, Counters, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t, H, GROUP, T, NB, scale, programs,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of full attention's queries, over the same work items as the forward pass."""
    d, r = tl.arange(0, D), tl.arange(0, BM)
    total = tl.load(Counters)
    item = tl.program_id(0)
    following = item + programs
    while item < total:
        after = tl.atomic_add(Counters + 1, 1) + 2 * programs
        h, record = (item % H).to(tl.int64), Items + item // H * 8
        b, i, lo = tl.load(record).to(tl.int64), tl.load(record + 1), tl.load(record + 2)
        hi, seen, part = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
        real = i * BM + r < tl.load(Before + b * 3 * (NB + 1) + NB)
        t = tl.load(Order + b * 3 * T + i * BM + r, mask=real, other=0)
        q = _load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
        do = _load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
        out = _load_rows(Out + b * o_b + h * o_h, t, real, o_t, D)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(Delta + (b * H + h) * T + t, delta, mask=real)
        lse = tl.load(Lse + (b * H + h) * T + t, mask=real, other=float("inf"))
        Kh, Vh = K + b * k_b + h // GROUP * k_h, V + b * v_b + h // GROUP * v_h
        dq = tl.zeros([BM, D], tl.float32)
        for n in range(lo, seen, BN):
            dq = _dq_tile(q, do, Kh, Vh, n, T, k_t, v_t, t, T, lse, delta, dq, scale, False, BN, D, PRECISION)
        for n in range(seen, hi, BN):
            dq = _dq_tile(q, do, Kh, Vh, n, T, k_t, v_t, t, T, lse, delta, dq, scale, True, BN, D, PRECISION)
        dq = dq * (scale * 0.6931471805599453)  # scale is 1 / sqrt(Dh) in base 2
        if part < 0:
            at = DQ + b * d_b + h * d_h + t[:, None].to(tl.int64) * d_t + d[None, :]
            tl.store(at, dq.to(DQ.dtype.element_ty), mask=real[:, None])
        else:
            at = Partial + ((part * H + h) * BM + r[:, None]) * D + d[None, :]
            tl.store(at, dq.to(Partial.dtype.element_ty))
        item = following
        following = after


@triton.jit
def local_dq_kernel(
    Q, K, V, Out, DOut, Lse, Delta, DQ, Order, Before, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t, H, GROUP, T, NB, window, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of local attention's queries."""
    h, i, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if i * BM >= tl.load(Before + (b * 3 + 2) * (NB + 1) + NB):
        return
    t, real, first, last = gather_rows(Order, Before, b, 2, i, T, NB, BM)
    q = _load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
    do = _load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
    out = _load_rows(Out + b * o_b + h * o_h, t, real, o_t, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + (b * H + h) * T + t, delta, mask=real)
    lse = tl.load(Lse + (b * H + h) * T + t, mask=real, other=float("inf"))
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    dq = tl.zeros([BM, D], tl.float32)
    for n in range(tl.maximum(first - window + 1, 0) // BN * BN, last + 1, BN):
        dq = _dq_tile(q, do, K, V, n, T, k_t, v_t, t, window, lse, delta, dq, scale, True, BN, D, PRECISION)
    d = tl.arange(0, D)
    at = DQ + b * d_b + h * d_h + t[:, None].to(tl.int64) * d_t + d[None, :]
    tl.store(at, (dq * (scale * 0.6931471805599453)).to(DQ.dtype.element_ty), mask=real[:, None])


@triton.jit
def linear_dq_kernel(
    Q, K, V, Out, DOut, Lse, Delta, DQ, S, Z, Order, Before, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t, H, GROUP, T, NB, NC,
    CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of linear attention's queries: through the state before their chunk, and the keys from there on."""
    h, i, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if i * BM >= tl.load(Before + (b * 3 + 1) * (NB + 1) + NB):
        return
    t, real, first, last = gather_rows(Order, Before, b, 1, i, T, NB, BM)
    d = tl.arange(0, D)
    q = _load_rows(Q + b * q_b + h * q_h, t, real, q_t, D).to(tl.float32)
    do = _load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
    out = _load_rows(Out + b * o_b + h * o_h, t, real, o_t, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + (b * H + h) * T + t, delta, mask=real)
    den = tl.load(Lse + (b * H + h) * T + t, mask=real, other=1.0)
    c = first // CHUNK
    row = (b * (H // GROUP) + h // GROUP) * NC + c
    s = tl.load(S + row * D * D + d[:, None] * D + d[None, :])
    z = tl.load(Z + row * D + d)
    dphi = tl.dot(do.to(s.dtype), tl.trans(s), input_precision=PRECISION) - delta[:, None] * z[None, :]
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    for n0 in range(c * CHUNK, last + 1, BN):
        n = n0 + tl.arange(0, BN)
        inside = (n < T)[:, None]
        k = tl.load(K + n[:, None].to(tl.int64) * k_t + d[None, :], mask=inside, other=0.0)
        v = tl.load(V + n[:, None].to(tl.int64) * v_t + d[None, :], mask=inside, other=0.0)
        a = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        a = tl.where(n[None, :] <= t[:, None], a, 0.0)
        dphi = tl.dot(a.to(k.dtype), phi(k.to(tl.float32)).to(k.dtype), dphi, input_precision=PRECISION)
    dq = dphi / den[:, None] * tl.where(q > 0, 1.0, tl.exp(tl.minimum(q, 0.0)))
    at = DQ + b * d_b + h * d_h + t[:, None].to(tl.int64) * d_t + d[None, :]
    tl.store(at, dq.to(DQ.dtype.element_ty), mask=real[:, None])


@triton.jit
def chunk_reverse_kernel(
    Q, DOut, Lse, Delta, R, RZ, Order, Before, q_b, q_h, q_t, g_b, g_h, g_t, H, GROUP, T, NB, NC,
    CHUNK: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the linear queries of one chunk add to R and rz, over the query heads of a key head."""
    c, hk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    row = b * 3 + 1
    lo = tl.load(Before + row * (NB + 1) + tl.minimum(c * CHUNK // 64, NB))
    hi = tl.load(Before + row * (NB + 1) + tl.minimum((c + 1) * CHUNK // 64, NB))
    r_acc = tl.zeros([D, D], tl.float32)
    rz = tl.zeros([D], tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        for r0 in range(lo, hi, BM):
            r = r0 + tl.arange(0, BM)
            real = r < hi
            t = tl.load(Order + row * T + r, mask=real, other=0)
            q = _load_rows(Q + b * q_b + h * q_h, t, real, q_t, D).to(tl.float32)
            do = _load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
            den = tl.load(Lse + (b * H + h) * T + t, mask=real, other=float("inf"))
            delta = tl.load(Delta + (b * H + h) * T + t, mask=real, other=0.0)
            feature = phi(q) / den[:, None]
            wide = R.dtype.element_ty
            r_acc = tl.dot(tl.trans(feature.to(wide)), do.to(wide), r_acc, input_precision=PRECISION)
            rz -= tl.sum(feature * delta[:, None], 0)
    row = (b * (H // GROUP) + hk) * NC + c
    tl.store(R + row * D * D + d[:, None] * D + d[None, :], r_acc.to(R.dtype.element_ty))
    tl.store(RZ + row * D + d, rz)


@triton.jit
def _dkv_rows(Q, DOut, Lse, Delta, Order, r0, end, k, v, n, dk, dv, q_t, g_t, scale, reach,
              MASKED: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What a block of softmax queries adds to the gradients of a block of keys; it sees `reach` keys back."""
    r = r0 + tl.arange(0, BM)
    real = r < end
    t = tl.load(Order + r, mask=real, other=0)
    q = _load_rows(Q, t, real, q_t, D)
    do = _load_rows(DOut, t, real, g_t, D)
    lse = tl.load(Lse + t, mask=real, other=float("inf"))
    delta = tl.load(Delta + t, mask=real, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
    p = tl.exp2(s * scale - lse[None, :])
    if MASKED:
        p = tl.where(sees(t[None, :], n[:, None], reach), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def dkv_kernel(
    Q, K, V, DOut, Lse, Delta, DK, DV, Order, Before, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, H, GROUP, T, NB, window, scale,
    FULL: tl.constexpr, LOCAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from the full and local queries that see it; blocks seen by most go first."""
    hk, j, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n0 = j * BN
    n, d = n0 + tl.arange(0, BN), tl.arange(0, D)
    inside = n < T
    k = _load_rows(K + b * k_b + hk * k_h, n, inside, k_t, D)
    v = _load_rows(V + b * v_b + hk * v_h, n, inside, v_t, D)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        Qh, DOh = Q + b * q_b + h * q_h, DOut + b * g_b + h * g_h
        Lh, Dh = Lse + (b * H + h) * T, Delta + (b * H + h) * T
        if FULL:
            counts, order = Before + b * 3 * (NB + 1), Order + b * 3 * T
            lo, end = tl.load(counts + n0 // 64), tl.load(counts + NB)
            clear = tl.load(counts + tl.minimum((n0 + BN + 63) // 64, NB))  # from here on every query sees the whole block
            split = lo + (clear - lo + BM - 1) // BM * BM
            for r0 in range(lo, split, BM):
                dk, dv = _dkv_rows(Qh, DOh, Lh, Dh, order, r0, end, k, v, n, dk, dv, q_t, g_t, scale,
                                   T, True, BM, D, PRECISION)  # fmt: skip
            for r0 in range(split, end, BM):
                dk, dv = _dkv_rows(
                    Qh, DOh, Lh, Dh, order, r0, end, k, v, n, dk, dv, q_t, g_t, scale, T, False, BM, D, PRECISION
                )
        if LOCAL:
            counts, order = Before + (b * 3 + 2) * (NB + 1), Order + (b * 3 + 2) * T
            lo, end = tl.load(counts + n0 // 64), tl.load(counts + tl.minimum((n0 + BN + window + 62) // 64, NB))
            for r0 in range(lo, end, BM):
                dk, dv = _dkv_rows(
                    Qh, DOh, Lh, Dh, order, r0, end, k, v, n, dk, dv, q_t, g_t, scale, window, True, BM, D, PRECISION
                )
    dk = dk * (scale * 0.6931471805599453)
    at = DK + b * dk_b + hk * dk_h + n[:, None].to(tl.int64) * dk_t + d[None, :]
    tl.store(at, dk.to(DK.dtype.element_ty), mask=inside[:, None])
    at = DV + b * dv_b + hk * dv_h + n[:, None].to(tl.int64) * dv_t + d[None, :]
    tl.store(at, dv.to(DV.dtype.element_ty), mask=inside[:, None])


@triton.jit
def linear_dkv_kernel(
    Q, K, V, DOut, Lse, Delta, DK, DV, R, RZ, Order, Before, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, H, GROUP, T, NB, NC,
    CHUNK: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from the linear queries after it; ADD: values already hold another part."""
    hk, j, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n0 = j * BN
    n, d = n0 + tl.arange(0, BN), tl.arange(0, D)
    inside = n < T
    k = _load_rows(K + b * k_b + hk * k_h, n, inside, k_t, D)
    v = _load_rows(V + b * v_b + hk * v_h, n, inside, v_t, D)
    x = k.to(tl.float32)
    wide = R.dtype.element_ty  # 1 / den would underflow in float16
    feature, v = phi(x).to(wide), v.to(wide)
    c = n0 // CHUNK
    row = (b * (H // GROUP) + hk) * NC + c
    r_all = tl.load(R + row * D * D + d[:, None] * D + d[None, :])
    rz = tl.load(RZ + row * D + d)
    dv = tl.dot(feature, r_all, input_precision=PRECISION)
    dphi = tl.dot(v, tl.trans(r_all), input_precision=PRECISION) + rz[None, :]
    line = b * 3 + 1
    lo = tl.load(Before + line * (NB + 1) + n0 // 64)
    end = tl.load(Before + line * (NB + 1) + tl.minimum((c + 1) * CHUNK // 64, NB))
    for g in range(GROUP):
        h = hk * GROUP + g
        for r0 in range(lo, end, BM):
            r = r0 + tl.arange(0, BM)
            real = r < end
            t = tl.load(Order + line * T + r, mask=real, other=0)
            q = _load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
            do = _load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D).to(wide)
            den = tl.load(Lse + (b * H + h) * T + t, mask=real, other=float("inf"))
            delta = tl.load(Delta + (b * H + h) * T + t, mask=real, other=0.0)
            query = (phi(q.to(tl.float32)) / den[:, None]).to(wide)
            seen = (n[:, None] <= t[None, :]) & real[None, :]
            a = tl.where(seen, tl.dot(feature, tl.trans(query), input_precision=PRECISION), 0.0)  # [BN, BM]
            dv = tl.dot(a.to(wide), do, dv, input_precision=PRECISION)
            a = tl.where(seen, tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :], 0.0)
            dphi = tl.dot(a.to(wide), query, dphi, input_precision=PRECISION)
    at = DK + b * dk_b + hk * dk_h + n[:, None].to(tl.int64) * dk_t + d[None, :]
    tl.store(at, (dphi * tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))).to(DK.dtype.element_ty), mask=inside[:, None])
    at = DV + b * dv_b + hk * dv_h + n[:, None].to(tl.int64) * dv_t + d[None, :]
    if ADD:
        dv += tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(at, dv.to(DV.dtype.element_ty), mask=inside[:, None])
