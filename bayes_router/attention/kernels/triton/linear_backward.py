# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of linear attention's backward pass; words, heads and decay as in `linear`.

With out = N / den, g = dout / den and gz = -delta / den, delta = sum(out * dout): every pair (t, s)
has the weight w_ts, whose gradient is g_t v_s + gz_t. What lies beyond a chunk goes through the
state S, and in reverse through

    R = sum_t phi(q_t) g_t^T,  rz = sum_t phi(q_t) gz_t,

over the queries after the chunk, as seen from its end.

With DECAY the log gate of token t has as gradient the sum of w_rs (g_r v_s + gz_r) over all pairs s
< t <= r that it stands
between: those that the end of its chunk parts (`Cross` of `prefix_kernel`), and phi(q_r) dphi(q_r)
- phi(k_r) dphi(k_r) added up over r from t to there. A single sum to the end of the text would
gather the rounding of all its tokens. Both kernels round a pair's part in the same way, so that it
cancels where it must.
"""

import triton
import triton.language as tl

from bayes_router.attention.kernels.triton.launch import follow
from bayes_router.attention.kernels.triton.linear import edge, elapsed, fade, feature_map
from bayes_router.attention.kernels.triton.rows import (
    count_rows,
    gather_rows,
    load_rows,
    nth_token,
    rows_before,
    table_row,
)


@triton.jit
def linear_dq_kernel(
    Q, K, V, Out, DOut, Lse, Delta, DQ, S, Z, Decay, DDecay, Order, Before, q_b, q_h, q_t, k_b,
    k_h, k_t, v_b, v_h, v_t,
    o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t, H, GROUP, VGROUP, UNIT, T, NB, NC,
    DECAY: tl.constexpr, SORTED: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries.

    Through the state before their chunk, and the keys from there on.
    """
    follow()
    h, i, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    u = table_row(b, h, H, UNIT)
    if i * BM >= count_rows(Before, u, 1, T, NB, SORTED):
        return
    t, real, first, last = gather_rows(Order, Before, u, 1, i, T, NB, SORTED, BM)
    d = tl.arange(0, D)
    # of operands; the weights of pairs would underflow in float16
    part = S.dtype.element_ty if DECAY else K.dtype.element_ty
    q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D).to(tl.float32)
    do = load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
    out = load_rows(Out + b * o_b + h * o_h, t, real, o_t, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + (b * H + h) * T + t, delta, mask=real)
    den = tl.load(Lse + (b * H + h) * T + t, mask=real, other=1.0)
    c = first // CHUNK
    hk = h // GROUP
    row = (b * (H // GROUP) + hk) * NC + c
    s = tl.load(S + row * D * D + d[:, None] * D + d[None, :])
    z = tl.load(Z + row * D + d)
    dphi = (
        tl.dot(do.to(s.dtype), tl.trans(s), input_precision=PRECISION) - delta[:, None] * z[None, :]
    )
    Decay += (b * (H // GROUP) + hk) * T
    if DECAY:
        since = tl.load(Decay + t)
        dphi *= (fade((since - edge(Decay, c * CHUNK, T)).to(tl.float32), 0.0) / den)[:, None]
    K += b * k_b + hk * k_h
    V += b * v_b + hk // VGROUP * v_h
    for n0 in range(c * CHUNK, last + 1, BN):
        n = n0 + tl.arange(0, BN)
        inside = n < T
        k = tl.load(K + n[:, None].to(tl.int64) * k_t + d[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(V + n[:, None].to(tl.int64) * v_t + d[None, :], mask=inside[:, None], other=0.0)
        a = tl.dot(do.to(part), tl.trans(v.to(part)), input_precision=PRECISION) - delta[:, None]
        if DECAY:
            base = tl.load(Decay + n0)
            a *= (
                fade(
                    (since - base).to(tl.float32)[:, None], elapsed(Decay, n, base, inside)[None, :]
                )
                / den[:, None]
            )
        a = tl.where(n[None, :] <= t[:, None], a, 0.0)
        dphi = tl.dot(a.to(part), feature_map(k, DECAY).to(part), dphi, input_precision=PRECISION)
    if DECAY:
        tl.store(
            DDecay + (b * H + h) * T + t, tl.sum(q.to(part).to(tl.float32) * dphi, 1), mask=real
        )
    else:
        dphi *= tl.where(q > 0, 1.0, tl.exp(tl.minimum(q, 0.0))) / den[:, None]
    at = DQ + b * d_b + h * d_h + t[:, None].to(tl.int64) * d_t + d[None, :]
    tl.store(at, dphi.to(DQ.dtype.element_ty), mask=real[:, None])


@triton.jit
def chunk_reverse_kernel(
    Q, DOut, Lse, Delta, R, RZ, Decay, Order, Before, q_b, q_h, q_t, g_b, g_h, g_t, H, GROUP, UNIT,
    T, NB, NC,
    DECAY: tl.constexpr, SORTED: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of one chunk add to R and rz as seen from its start.

    Over the query heads of a key head.
    """
    follow()
    c, hk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    r_acc = tl.zeros([D, D], tl.float32)
    rz = tl.zeros([D], tl.float32)
    row = b * (H // GROUP) + hk
    Decay += row * T
    if DECAY:
        base = edge(Decay, c * CHUNK, T)
    for g in range(GROUP):
        h = hk * GROUP + g
        u = table_row(b, h, H, UNIT)
        lo = rows_before(Before, u, 1, c * CHUNK, T, NB, SORTED)
        hi = rows_before(Before, u, 1, (c + 1) * CHUNK, T, NB, SORTED)
        for r0 in range(lo, hi, BM):
            r = r0 + tl.arange(0, BM)
            real = r < hi
            t = nth_token(Order, u, 1, r, real, T, SORTED)
            q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
            do = load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D)
            den = tl.load(Lse + (b * H + h) * T + t, mask=real, other=float("inf"))
            delta = tl.load(Delta + (b * H + h) * T + t, mask=real, other=0.0)
            feature = feature_map(q, DECAY) / den[:, None]
            if DECAY:
                feature *= fade(elapsed(Decay, t, base, real), 0.0)[:, None]
            wide = R.dtype.element_ty
            r_acc = tl.dot(  # transposed, as the states are
                tl.trans(do.to(wide)), feature.to(wide), r_acc, input_precision=PRECISION
            )
            rz -= tl.sum(feature * delta[:, None], 0)
    row = row * NC + c
    tl.store(R + row * D * D + d[:, None] * D + d[None, :], tl.trans(r_acc).to(R.dtype.element_ty))
    tl.store(RZ + row * D + d, rz)


@triton.jit
def linear_dkv_kernel(
    Q, K, V, DOut, Lse, Delta, DK, DV, R, RZ, Decay, DDecay, Order, Before, q_b, q_h, q_t, k_b,
    k_h, k_t, v_b, v_h, v_t,
    g_b, g_h, g_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, H, GROUP, VGROUP, UNIT, T, NB, NC,
    DECAY: tl.constexpr, SORTED: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from the queries after it.

    DV has the heads of K. DDecay comes with the part of the queries and leaves as the difference of
    both.
    """
    follow()
    hk, j, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n0 = j * BN
    n, d = n0 + tl.arange(0, BN), tl.arange(0, D)
    inside = n < T
    k = load_rows(K + b * k_b + hk * k_h, n, inside, k_t, D)
    v = load_rows(V + b * v_b + hk // VGROUP * v_h, n, inside, v_t, D)
    x = k.to(tl.float32)
    wide = R.dtype.element_ty  # 1 / den would underflow in float16
    feature, v = feature_map(x, DECAY).to(wide), v.to(wide)
    c = n0 // CHUNK
    head = b * (H // GROUP) + hk
    row = head * NC + c
    r_all = tl.load(R + row * D * D + d[:, None] * D + d[None, :])
    rz = tl.load(RZ + row * D + d)
    dv = tl.dot(feature, r_all, input_precision=PRECISION)
    dphi = tl.dot(v, tl.trans(r_all), input_precision=PRECISION) + rz[None, :]
    Decay += head * T
    if DECAY:
        base = tl.load(Decay + n0)
        since = elapsed(Decay, n, base, inside)
        kept = fade((edge(Decay, (c + 1) * CHUNK, T) - base).to(tl.float32), since)[:, None]
        dv *= kept
        dphi *= kept
    for g in range(GROUP):
        h = hk * GROUP + g
        u = table_row(b, h, H, UNIT)
        lo = rows_before(Before, u, 1, n0, T, NB, SORTED)
        end = rows_before(Before, u, 1, (c + 1) * CHUNK, T, NB, SORTED)
        for r0 in range(lo, end, BM):
            r = r0 + tl.arange(0, BM)
            real = r < end
            t = nth_token(Order, u, 1, r, real, T, SORTED)
            q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
            do = load_rows(DOut + b * g_b + h * g_h, t, real, g_t, D).to(wide)
            den = tl.load(Lse + (b * H + h) * T + t, mask=real, other=float("inf"))
            delta = tl.load(Delta + (b * H + h) * T + t, mask=real, other=0.0)
            query = (feature_map(q, DECAY) if DECAY else feature_map(q, DECAY) / den[:, None]).to(
                wide
            )
            seen = (n[:, None] <= t[None, :]) & real[None, :]
            a = tl.dot(feature, tl.trans(query), input_precision=PRECISION)  # [BN, BM]
            da = tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :]
            if DECAY:
                weight = fade(elapsed(Decay, t, base, real)[None, :], since[:, None]) / den[None, :]
                a *= weight
                da *= weight
            dv = tl.dot(tl.where(seen, a, 0.0).to(wide), do, dv, input_precision=PRECISION)
            dphi = tl.dot(tl.where(seen, da, 0.0).to(wide), query, dphi, input_precision=PRECISION)
    if DECAY:
        at = DDecay + (b * H + hk) * T + n
        tl.store(
            at,
            tl.load(at, mask=inside, other=0.0) - tl.sum(feature.to(tl.float32) * dphi, 1),
            mask=inside,
        )
    else:
        dphi *= tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    at = DK + b * dk_b + hk * dk_h + n[:, None].to(tl.int64) * dk_t + d[None, :]
    tl.store(at, dphi.to(DK.dtype.element_ty), mask=inside[:, None])
    at = DV + b * dv_b + hk * dv_h + n[:, None].to(tl.int64) * dv_t + d[None, :]
    tl.store(at, dv.to(DV.dtype.element_ty), mask=inside[:, None])


@triton.jit
def log_gate_kernel(DDecay, Cross, T, NC, parts, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """In place, from gradients of the decay to those of the log gates, one chunk of one head."""
    follow()
    c, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, p = c * CHUNK + tl.arange(0, CHUNK), tl.arange(0, PARTS)
    beyond = tl.sum(tl.load(Cross + (head * parts + p) * NC + c, mask=p < parts, other=0.0), 0)
    at = DDecay + head * T + n
    own = tl.load(at, mask=n < T, other=0.0)
    tl.store(at, tl.cumsum(own, 0, reverse=True) + beyond, mask=n < T)
