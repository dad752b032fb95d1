# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""One decoding step of a batch on the GPU in two launches, with static shapes and no host synchronisation.

Each row reads only what its own expert sees: the keys of a row on `full` or `local` are cut into SPLITS stretches, one program
each, whose partial results a second kernel joins; one more program a key head adds the new token to the linear state and, on
`linear`, reads it. The new key and value are stored on the way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bayes_router.attention.forward_triton import EPSILON, HIDDEN, phi
from bayes_router.attention.launch_triton import launch

MIN_KEYS = 512  # in a stretch, at least
PROGRAMS = 16384  # about as many as are launched


@triton.jit
def _visible(route, length, full, local, window):
    """First stored key that the row sees, and whether it sees any: keys first .. length - 1, besides the new one."""
    on_local = route == local
    return tl.where(on_local, tl.maximum(length - window + 1, 0), 0), on_local | (route == full)


@triton.jit
def decode_kernel(
    Q, NewK, NewV, PlainQ, PlainK, Keys, Values, State, Route, Lengths, Out, Partial, PartialLse,
    q_b, q_h, k_b, k_h, v_b, v_h, pq_b, pq_h, pk_b, pk_h, s_b, s_h, s_t, r_b, H, GROUP, full, linear, local, window, scale,
    SPLITS: tl.constexpr, STATE: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (split, key head, row of the batch); split SPLITS is the linear state."""
    split, hk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    route = tl.load(Route + b * r_b)
    length = tl.load(Lengths + b).to(tl.int32)
    d, g = tl.arange(0, D), tl.arange(0, ROWS)
    h = hk * GROUP + g
    mine = g < GROUP
    v_new = tl.load(NewV + b * v_b + hk * v_h + d)
    if split == SPLITS:
        if STATE:
            feature = phi(tl.load(PlainK + b * pk_b + hk * pk_h + d).to(tl.float32))
            state = State + (b * (H // GROUP) + hk) * D * (D + 1) + d * (D + 1)
            s = tl.load(state[:, None] + d[None, :]) + feature[:, None] * v_new.to(tl.float32)[None, :]
            z = tl.load(state + D) + feature
            tl.store(state[:, None] + d[None, :], s)
            tl.store(state + D, z)
            if route == linear:
                for j in range(GROUP):
                    query = phi(tl.load(PlainQ + b * pq_b + (hk * GROUP + j) * pq_h + d).to(tl.float32))
                    out = tl.sum(query[:, None] * s, 0) / (tl.sum(query * z, 0) + EPSILON)
                    tl.store(Out + (b * H + hk * GROUP + j) * D + d, out.to(Out.dtype.element_ty))
    else:
        row_k, row_v = Keys + b * s_b + hk * s_h, Values + b * s_b + hk * s_h
        k_new = tl.load(NewK + b * k_b + hk * k_h + d)
        if STORE and split == 0:
            tl.store(row_k + length.to(tl.int64) * s_t + d, k_new)
            tl.store(row_v + length.to(tl.int64) * s_t + d, v_new)
        first, any_key = _visible(route, length, full, local, window)
        span = ((length - first + SPLITS - 1) // SPLITS + BN - 1) // BN * BN
        lo = first + split * span
        hi = tl.minimum(lo + span, length)
        if any_key & ((lo < hi) | (split == 0)):
            q = tl.load(Q + b * q_b + h[:, None] * q_h + d[None, :], mask=mine[:, None], other=0.0)
            m = tl.full([ROWS], HIDDEN, tl.float32)
            norm = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, D], tl.float32)
            if split == 0:  # the new token sees itself
                m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
                norm += 1.0
                acc += v_new.to(tl.float32)[None, :]
            for n0 in range(lo, hi, BN):
                n = n0 + tl.arange(0, BN)
                inside = n < hi
                at = n[:, None].to(tl.int64) * s_t + d[None, :]
                k = tl.load(row_k + at, mask=inside[:, None], other=0.0)
                v = tl.load(row_v + at, mask=inside[:, None], other=0.0)
                x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                x = tl.where(inside[None, :], x, -float("inf"))
                m_new = tl.maximum(m, tl.max(x, 1))
                p = tl.exp2(x - m_new[:, None])
                alpha = tl.exp2(m - m_new)
                norm = norm * alpha + tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
                m = m_new
            at_part = (b * H + h) * SPLITS + split
            tl.store(Partial + at_part[:, None] * D + d[None, :], acc / norm[:, None], mask=mine[:, None])
            tl.store(PartialLse + at_part, m + tl.log2(norm), mask=mine)


@triton.jit
def join_kernel(
    Partial, PartialLse, Route, Lengths, Out, r_b, H, full, local, window,
    SPLITS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Join the stretches of one row and head."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(Lengths + b).to(tl.int32)
    first, any_key = _visible(tl.load(Route + b * r_b), length, full, local, window)
    if any_key:
        span = ((length - first + SPLITS - 1) // SPLITS + BN - 1) // BN * BN
        split, d = tl.arange(0, SPLITS), tl.arange(0, D)
        used = (split == 0) | (first + split * span < length)
        at = (b * H + h) * SPLITS + split
        lse = tl.load(PartialLse + at, mask=used, other=-float("inf"))
        value = tl.load(Partial + at[:, None] * D + d[None, :], mask=used[:, None], other=0.0)
        weight = tl.exp2(lse - tl.max(lse, 0))
        out = tl.sum(value * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(Out + (b * H + h) * D + d, out.to(Out.dtype.element_ty))


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plain_q: Tensor,
    plain_k: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    state: Tensor | None,
    route: Tensor,
    lengths: Tensor,
    native: tuple[int, int, int],
    window: int,
) -> Tensor:
    """Append one token to each row and attend: [B, H, 1, Dh].

    Args:
        q: [B, H, 1, Dh]; k, v, plain_q and plain_k likewise, of the new token.
        k: see q.
        v: see q.
        plain_q: see q.
        plain_k: see q.
        keys: the store [B, Hkv, S, Dh], written at `lengths`; None where no expert looks at keys.
        values: as keys.
        state: the linear state [B, Hkv, Dh, Dh + 1] float32, advanced in place; None where no expert is linear.
        route: [B, 1].
        lengths: [B] tokens stored.
        native: indices of full, linear and local among the experts, -1 where absent; there are no others.
        window: of the local expert.
    """
    (B, H, _, D), Hkv = q.shape, k.shape[1]
    stored = keys if keys is not None and values is not None else k
    splits = 1
    while splits * 2 <= min(64, stored.shape[2] // MIN_KEYS, max(PROGRAMS // max(B * Hkv, 1), 1)):
        splits *= 2
    out = torch.empty(B, H, 1, D, device=q.device, dtype=q.dtype)
    partial = torch.empty(B, H, splits, D, device=q.device, dtype=torch.float32)
    partial_lse = torch.empty(B, H, splits, device=q.device, dtype=torch.float32)
    full, linear, local = native
    looks = keys is not None
    strides = [s for x in (q, k, v, plain_q, plain_k) for s in x.stride()[:2]]
    block = 64 if D <= 64 else 32
    fixed = {"SPLITS": splits, "BN": block, "D": D}
    launch(
        decode_kernel, (splits + 1, Hkv, B),
        q, k, v, plain_q, plain_k, stored, stored if values is None else values, partial if state is None else state, route,
        lengths, out, partial, partial_lse, *strides, *stored.stride()[:3], route.stride(0), H, H // Hkv, full, linear, local,
        window, 1.4426950408889634 / D**0.5, STATE=state is not None, STORE=looks,
        ROWS=max(16, triton.next_power_of_2(H // Hkv)), PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=3, **fixed,
    )  # fmt: skip
    if looks:
        launch(
            join_kernel,
            (H, B),
            partial,
            partial_lse,
            route,
            lengths,
            out,
            route.stride(0),
            H,
            full,
            local,
            window,
            num_warps=4,
            **fixed,
        )
    return out
