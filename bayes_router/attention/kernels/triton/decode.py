# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""One decoding step of a batch on the GPU in two launches.

Shapes are static and nothing waits for the host.

Each row reads only what its own experts see: of each key head the most that one of its query heads
sees, cut into SPLITS stretches, one program each, whose partial results a second kernel joins;
query heads that see less are masked. One more program a key head adds the new token to the linear
state and, on `linear`, reads it; one more a query head does so with the gated state. The new key
and value are stored on the way.
"""

import triton
import triton.language as tl

from bayes_router.attention.kernels.triton.launch import follow
from bayes_router.attention.kernels.triton.rows import EPSILON, HIDDEN, phi


@triton.jit
def _visible(route, length, full, local, window):
    """First stored key that a head on this route sees, to length - 1 besides the new one.

    And whether it sees any.
    """
    on_local = route == local
    return tl.where(on_local, tl.maximum(length - window + 1, 0), 0), on_local | (route == full)


@triton.jit
def _first_read(Route, hk, GROUP, UNIT, r_r, length, full, local, window, ROWS: tl.constexpr):
    """First stored key that some query head of a key head sees, and whether one does.

    And both of each head [ROWS].
    """
    g = tl.arange(0, ROWS)
    route = tl.load(Route + (hk * GROUP + g) // UNIT * r_r, mask=g < GROUP, other=-1)
    first, looks = _visible(route, length, full, local, window)
    looks = looks & (g < GROUP)
    return (
        tl.min(tl.where(looks, first, length), 0),
        tl.max(looks.to(tl.int32), 0) > 0,
        first,
        looks,
    )


@triton.jit
def _softmax(x, scale):
    """softmax(scale x) of a vector; -inf past its end."""
    y = tl.exp((x - tl.max(x, 0)) * scale)
    return y / tl.sum(y, 0)


@triton.jit
def _step_state(
    State, Value, PlainQ, Out, feature, keep, scale, q_h, heads, Route, head, UNIT, r_r, number,
    GATED: tl.constexpr, DIM: tl.constexpr, BC: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """State <- keep State + feature [value, 1]^T, BC columns at a time.

    It is read by those of `heads` heads on `number`.
    """
    d = tl.arange(0, D)
    real = d < DIM
    rows = State + d * (DIM + 1)
    z = tl.load(rows + DIM, mask=real, other=0.0) * keep + feature
    tl.store(rows + DIM, z, mask=real)
    for first in range(0, D, BC):
        c = first + tl.arange(0, BC)
        inside = c < DIM
        both = real[:, None] & inside[None, :]
        value = tl.load(Value + c, mask=inside, other=0.0).to(tl.float32)
        s = (
            tl.load(rows[:, None] + c[None, :], mask=both, other=0.0) * keep
            + feature[:, None] * value[None, :]
        )
        tl.store(rows[:, None] + c[None, :], s, mask=both)
        for j in range(heads):
            if tl.load(Route + (head + j) // UNIT * r_r) == number:
                x = tl.load(PlainQ + j * q_h + d, mask=real, other=-float("inf")).to(tl.float32)
                query = _softmax(x, scale) if GATED else phi(x)
                out = tl.sum(query[:, None] * s, 0) / (tl.sum(query * z, 0) + EPSILON)
                tl.store(Out + j * DIM + c, out.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, row_k, row_v, n, inside, real, s_t, scale, D: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [ROWS, BN] of the stored keys at n, and their values.

    Those not inside are not read.
    """
    at = n[:, None].to(tl.int64) * s_t + tl.arange(0, D)[None, :]
    there = inside[:, None] & real[None, :]
    k = tl.load(row_k + at, mask=there, other=0.0)
    v = tl.load(row_v + at, mask=there, other=0.0)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, v


@triton.jit
def _soften_step(x, v, m, norm, acc, PRECISION: tl.constexpr):
    """One tile of online softmax."""
    m_new = tl.maximum(m, tl.max(x, 1))
    p = tl.exp2(x - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    norm = norm * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, norm, acc


@triton.jit
def _new_row(New, Row, length, s_t, d, real, HELD: tl.constexpr):
    """The new token's key or value [D]; HELD: it is read where the store has it already."""
    at = Row + length.to(tl.int64) * s_t if HELD else New
    return tl.load(at + d, mask=real, other=0.0)


@triton.jit
def _over_keys(
    q, Row_k, Row_v, Seen, lo, hi, firsts, looks, sink_end, slots, real, s_t, scale, m, norm, acc,
    BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    RING: tl.constexpr, MASKED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Online softmax of the heads that look over the stored keys lo .. hi - 1.

    Each head sees those from its first on and, with SINKS, those before sink_end.
    """
    for n0 in range(lo, hi, BN):
        n = n0 + tl.arange(0, BN)
        inside = n < hi
        at = n % slots if RING else n
        x, v = _scores(q, Row_k, Row_v, at, inside, real, s_t, scale, D, PRECISION)
        if MASKED:  # behind the loads of keys, which do not wait for it; a hidden value may be NaN
            inside = inside & (tl.load(Seen + n, mask=inside, other=0) != 0)
            v = tl.where(inside[:, None], v, 0.0)
        within = n[None, :] >= firsts[:, None]
        if SINKS:
            within = within | (n < sink_end)[None, :]
        x = tl.where(inside[None, :] & looks[:, None] & within, x, -float("inf"))
        m, norm, acc = _soften_step(x, v, m, norm, acc, PRECISION)
    return m, norm, acc


@triton.jit
def _step_stretch(
    Q, NewK, NewV, Row_k, Row_v, Route, Length, Seen, SinkEnd, Partial, PartialLse,
    part, hk, q_h, s_t, r_r, GROUP, UNIT, slots, full, local, window, sinks, scale,
    SPLITS: tl.constexpr, STORE: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    HELD: tl.constexpr, MASKED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One stretch of the keys of a row and key head: its partial results.

    The first stretch has the new token, which it stores, and the sinks.
    """
    d, g = tl.arange(0, D), tl.arange(0, ROWS)
    real, mine = d < DIM, g < GROUP
    length = tl.load(Length).to(tl.int32) - (1 if HELD else 0)
    first, any_key, firsts, looks = _first_read(
        Route, hk, GROUP, UNIT, r_r, length, full, local, window, ROWS
    )
    v_new = _new_row(NewV, Row_v, length, s_t, d, real, HELD)
    k_new = _new_row(NewK, Row_k, length, s_t, d, real, HELD)
    sink_end = sinks
    if SINKS == 2:
        sink_end = tl.load(SinkEnd).to(tl.int32)
    if STORE and part == 0:
        slot = (length % slots if RING else length).to(tl.int64) * s_t
        tl.store(Row_k + slot + d, k_new, mask=real)
        tl.store(Row_v + slot + d, v_new, mask=real)
    span = ((length - first + SPLITS - 1) // SPLITS + BN - 1) // BN * BN
    lo = first + part * span
    hi = tl.minimum(lo + span, length)
    if any_key & ((lo < hi) | (part == 0)):
        both = mine[:, None] & real[None, :]
        q = tl.load(Q + g[:, None] * q_h + d[None, :], mask=both, other=0.0)
        m = tl.full([ROWS], HIDDEN, tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        if part == 0:  # the new token sees itself
            m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
            norm += 1.0
            acc += v_new.to(tl.float32)[None, :]
        if SINKS and part == 0:
            m, norm, acc = _over_keys(
                q, Row_k, Row_v, Seen, 0, tl.minimum(sink_end, first), tl.zeros_like(firsts),
                looks, 0, slots, real, s_t, scale, m, norm, acc,
                BN, D, PRECISION, False, MASKED, False,
            )  # fmt: skip
        m, norm, acc = _over_keys(
            q, Row_k, Row_v, Seen, lo, hi, firsts, looks, sink_end, slots, real, s_t, scale,
            m, norm, acc, BN, D, PRECISION, RING, MASKED, SINKS,
        )  # fmt: skip
        at = g * SPLITS + part
        out = acc / tl.maximum(norm, 1e-30)[:, None]
        tl.store(Partial + at[:, None] * D + d[None, :], out, mask=mine[:, None])
        tl.store(PartialLse + at, m + tl.log2(norm), mask=mine)


@triton.jit
def _gated_row(plain_k, real, Gate, Bias, LogScale, d):
    """(feature [D], gate, sharpness) by which the gated state of a head takes the new key in."""
    sharpness = tl.exp(tl.load(LogScale).to(tl.float32))
    gate = tl.load(Gate + d, mask=real, other=0.0).to(tl.float32)
    logit = tl.sum(tl.where(real, plain_k, 0.0) * gate, 0) + tl.load(Bias).to(tl.float32)
    return _softmax(plain_k, sharpness), 1.0 / (1.0 + tl.exp(-logit)), sharpness


@triton.jit
def decode_kernel(
    Q, NewK, NewV, PlainQ, PlainK, Keys, Values, LinearState, GatedState, Gate, Bias, LogScale,
    Route, Lengths, Out,
    Partial, PartialLse, Seen, SinkEnd,
    q_b, q_h, k_b, k_h, v_b, v_h, pq_b, pq_h, pk_b, pk_h, s_b, s_h, s_t, r_b, r_r, seen_b, l_b,
    H, GROUP, UNIT, slots, full, linear, local, gated, window, sinks, scale,
    SPLITS: tl.constexpr, LINEAR: tl.constexpr, GATED: tl.constexpr, STORE: tl.constexpr,
    RING: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr = False, MASKED: tl.constexpr = False, SINKS: tl.constexpr = 0,
):  # fmt: skip
    """Program (part, key head, row of the batch): the parts are SPLITS stretches, the linear state,
    GROUP gated states.

    HELD: the new key and value stand in the store already, and Lengths counts them. MASKED: Seen
    hides keys. SINKS: keys that are seen and stand before `sinks` (1) or the row's SinkEnd (2) are
    seen by `local` too, whose first part reads them.
    """
    follow()
    part, hk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    Route += b * r_b
    h = hk * GROUP  # the first query head
    NewV += b * v_b + hk * v_h
    if part < SPLITS:
        row, at = b * s_b + hk * s_h, (b * H + h) * SPLITS
        _step_stretch(
            Q + b * q_b + h * q_h, NewK + b * k_b + hk * k_h, NewV, Keys + row, Values + row,
            Route, Lengths + b * l_b, Seen + b * seen_b, SinkEnd + b,
            Partial + at * D, PartialLse + at,
            part, hk, q_h, s_t, r_r, GROUP, UNIT, slots, full, local, window, sinks, scale,
            SPLITS, STORE, RING, ROWS, BN, DIM, D, PRECISION, HELD, MASKED, SINKS,
        )  # fmt: skip
    else:
        d = tl.arange(0, D)
        real = d < DIM
        plain_k = tl.load(PlainK + b * pk_b + hk * pk_h + d, mask=real, other=-float("inf"))
        plain_k = plain_k.to(tl.float32)
        PlainQ += b * pq_b
        if LINEAR and part == SPLITS:
            _step_state(
                LinearState + (b * (H // GROUP) + hk) * DIM * (DIM + 1), NewV, PlainQ + h * pq_h,
                Out + (b * H + h) * DIM, phi(plain_k), 1.0, 1.0, pq_h, GROUP, Route, h, UNIT, r_r,
                linear, False, DIM, BC, D,
            )  # fmt: skip
        if GATED and part >= SPLITS + LINEAR:
            h += part - SPLITS - LINEAR
            feature, keep, sharpness = _gated_row(
                plain_k, real, Gate + h * DIM, Bias + h, LogScale + h, d
            )
            _step_state(
                GatedState + (b * H + h) * DIM * (DIM + 1), NewV, PlainQ + h * pq_h,
                Out + (b * H + h) * DIM, feature, keep, sharpness, pq_h, 1,
                Route, h, UNIT, r_r, gated, True, DIM, BC, D,
            )  # fmt: skip


# keeps the assertions, which stand here as debugging would slow the loop over keys
@triton.jit(debug=True)
def join_kernel(
    Partial, PartialLse, Route, Lengths, Out, r_b, r_r, l_b, H, GROUP, UNIT, room, num_experts,
    full, local, window, HELD: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Join the stretches of one row and head.

    A route out of range or a row without room must not pass silently.
    """
    follow()
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Route += b * r_b
    length = tl.load(Lengths + b * l_b).to(tl.int32) - (1 if HELD else 0)
    route = tl.load(Route + h // UNIT * r_r)
    tl.device_assert((route >= 0) & (route < num_experts), "route out of range")
    tl.device_assert(length < room, "the cache is full")
    first, _, _, _ = _first_read(
        Route, h // GROUP, GROUP, UNIT, r_r, length, full, local, window, ROWS
    )
    if (route == full) | (route == local):
        span = ((length - first + SPLITS - 1) // SPLITS + BN - 1) // BN * BN
        split, d = tl.arange(0, SPLITS), tl.arange(0, D)
        used = (split == 0) | (first + split * span < length)
        at = (b * H + h) * SPLITS + split
        lse = tl.load(PartialLse + at, mask=used, other=-float("inf"))
        value = tl.load(Partial + at[:, None] * D + d[None, :], mask=used[:, None], other=0.0)
        weight = tl.exp2(lse - tl.max(lse, 0))
        out = tl.sum(value * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(Out + (b * H + h) * DIM + d, out.to(Out.dtype.element_ty), mask=d < DIM)
