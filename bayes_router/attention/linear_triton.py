# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of linear attention: what each chunk of keys adds, the running state before each chunk, and the reads.

State arrays: S [B, Hkv, NC, D, D] in bfloat16 (float32 for float32 inputs; float16 would overflow) and z [B, Hkv, NC, D]
in float32, first what chunk c adds, then (after `prefix_kernel`) what stands before it. The running sums themselves are
taken in float32.
"""

import triton
import triton.language as tl

from bayes_router.attention.forward_triton import EPSILON, gather_rows, phi


@triton.jit
def chunk_kernel(
    K, V, S, Z, k_b, k_h, k_t, v_b, v_h, v_t, Hkv, num_keys, NC,
    CHUNK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk of keys adds to the state: sum phi(k) v^T and sum phi(k)."""
    c, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    d = tl.arange(0, D)
    s = tl.zeros([D, D], tl.float32)
    z = tl.zeros([D], tl.float32)
    for n0 in range(0, CHUNK, BN):
        n = c * CHUNK + n0 + tl.arange(0, BN)
        inside = (n < num_keys)[:, None]
        k = tl.load(K + n[:, None].to(tl.int64) * k_t + d[None, :], mask=inside, other=-float("inf")).to(tl.float32)
        v = tl.load(V + n[:, None].to(tl.int64) * v_t + d[None, :], mask=inside, other=0.0)
        feature = phi(k).to(v.dtype)
        s = tl.dot(tl.trans(feature), v, s, input_precision=PRECISION)
        z += tl.sum(feature.to(tl.float32), 0)
    row = (b * Hkv + h) * NC + c
    tl.store(S + row * D * D + d[:, None] * D + d[None, :], s.to(S.dtype.element_ty))
    tl.store(Z + row * D + d, z)


@triton.jit
def prefix_kernel(S, Z, NC, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """In place, what stands before each chunk (REVERSE: after it). The last programs of a head take z."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    if REVERSE:
        c = CHUNKS - 1 - c
    inside = (c < NC)[:, None]
    if part < D * D // BLOCK:
        x = part * BLOCK + tl.arange(0, BLOCK)
        at = S + head * NC * D * D + c[:, None].to(tl.int64) * (D * D) + x[None, :]
        added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (tl.cumsum(added, 0) - added).to(S.dtype.element_ty), mask=inside)
    else:
        x = (part - D * D // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        both = inside & (x < D)[None, :]
        at_z = Z + head * NC * D + c[:, None].to(tl.int64) * D + x[None, :]
        added = tl.load(at_z, mask=both, other=0.0)
        tl.store(at_z, tl.cumsum(added, 0) - added, mask=both)


@triton.jit
def linear_kernel(
    Q, K, V, Out, Lse, S, Z, Order, Before, Starts, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H, GROUP, T, NB, num_keys, start, NC,
    STARTS: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads of a block of sorted linear queries: the state before the chunk of the first, and the keys from there on."""
    h, i, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if i * BM >= tl.load(Before + (b * 3 + 1) * (NB + 1) + NB):
        return
    begin = start
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    t, real, first, last = gather_rows(Order, Before, b, 1, i, T, NB, BM)
    pos, d = t + begin, tl.arange(0, D)
    q = tl.load(Q + b * q_b + h * q_h + t[:, None].to(tl.int64) * q_t + d[None, :])
    feature = phi(q.to(tl.float32)).to(q.dtype)
    c = (first + begin) // CHUNK
    row = (b * (H // GROUP) + h // GROUP) * NC + c
    s = tl.load(S + row * D * D + d[:, None] * D + d[None, :])
    z = tl.load(Z + row * D + d)
    acc = tl.dot(feature.to(s.dtype), s, input_precision=PRECISION)
    den = tl.sum(feature.to(tl.float32) * z[None, :], 1)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    for n0 in range(c * CHUNK, last + begin + 1, BN):
        n = n0 + tl.arange(0, BN)
        inside = (n < num_keys)[:, None]
        k = tl.load(K + n[:, None].to(tl.int64) * k_t + d[None, :], mask=inside, other=0.0)
        v = tl.load(V + n[:, None].to(tl.int64) * v_t + d[None, :], mask=inside, other=0.0)
        a = tl.dot(feature, tl.trans(phi(k.to(tl.float32)).to(q.dtype)), input_precision=PRECISION)
        a = tl.where(n[None, :] <= pos[:, None], a, 0.0)
        den += tl.sum(a, 1)
        acc = tl.dot(a.to(v.dtype), v, acc, input_precision=PRECISION)
    den += EPSILON
    at = Out + b * o_b + h * o_h + t[:, None].to(tl.int64) * o_t + d[None, :]
    tl.store(at, (acc / den[:, None]).to(Out.dtype.element_ty), mask=real[:, None])
    tl.store(Lse + (b * H + h) * T + t, den, mask=real)
