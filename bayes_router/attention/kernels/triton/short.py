# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Hard routing of short texts on the GPU in two launches, where the backend `triton` has eight.

The first sorts the tokens by route and sums up each chunk of keys for linear attention. In the
second, programs stay resident and take items off a list that they all know, heaviest kind first:

    full    a block of queries against a segment of the keys; the last to finish a block joins
            its segments
    local   a block of queries against the hull of their windows
    linear  a block of queries: the sums of the chunks before it are added up on the way, its
            last keys follow one by one

Adding up the chunks anew for every block is quadratic in the length, which a longer text would
feel; the state of a large head does not fit into registers meanwhile, so that a launch between the
two adds up there. Forward only.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bayes_router.attention.kernels.triton.forward import attend_band, attend_keys
from bayes_router.attention.kernels.triton.launch import follow
from bayes_router.attention.kernels.triton.linear import add_chunk
from bayes_router.attention.kernels.triton.plan import sort_tokens
from bayes_router.attention.kernels.triton.rows import EPSILON, HIDDEN, gather_rows, load_rows, phi


@triton.jit(debug=True)  # keeps the assertion: a route out of range must not pass silently
def prepare_kernel(
    Route, Lengths, Order, Before, PlainK, V, S, Z, Arrived, r_b, r_t, r_r, k_b, k_h, k_t, v_b,
    v_h, v_t,
    full, linear, local, num_experts, U, R, HK, T, NB, num_keys, NC, blocks,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tables of `plan`, a program for each kind of a row of them.

    Then each chunk's sums, a program for each head of K.
    """
    follow()
    x = tl.program_id(0)
    if x < 3 * U:
        u = (x // 3).to(tl.int64)
        sort_tokens(
            Route, Lengths, Order, Before, T, NB, R, r_b, r_t, r_r, full, linear, local,
            num_experts, 0, 0, x % 3, u, PADDED,
            BLOCK,
        )  # fmt: skip
        # blocks of full attention: none of their segments is there yet
        for i in range(x % 3 * BLOCK, blocks, 3 * BLOCK):
            at = i + tl.arange(0, BLOCK)
            tl.store(Arrived + u * blocks + at, 0, mask=at < blocks)
    else:
        x -= 3 * U
        h, b = (x // NC % HK).to(tl.int64), (x // NC // HK).to(tl.int64)
        add_chunk(PlainK, V, S, Z, Z, k_b, k_h, k_t, v_b, v_h, v_t, HK, 1, num_keys, NC, x % NC, h,
            b, False, CHUNK, BN, D,
                  PRECISION)  # fmt: skip


@triton.jit
def _full(
    q, Kh, Vh, Out, Partial, PartialLse, Arrived, t, real, begin, first, last, s, segment,
    num_keys, k_t, v_t, o_t, scale,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of full queries against segment s of the keys.

    The last segment joins them all.
    """
    d, r, pos = tl.arange(0, D), tl.arange(0, BM), t + begin
    lo, hi = s * segment, tl.minimum(s * segment + segment, last + begin + 1)
    if lo < hi:
        # end of the keys that all rows see
        seen = tl.maximum(tl.minimum((first + begin + 1) // BN * BN, hi // BN * BN), lo)
        m, norm, acc = attend_keys(
            q, Kh, Vh, lo, seen, hi, num_keys, k_t, v_t, pos, scale, BM, BN, D, PRECISION
        )
        acc = acc / tl.maximum(norm, 1e-30)[:, None]
        at = Out + t[:, None].to(tl.int64) * o_t + d[None, :]
        parts = (last + begin) // segment + 1
        if parts == 1:
            tl.store(at, acc.to(Out.dtype.element_ty), mask=real[:, None])
        else:
            one = r[:, None] * D + d[None, :]
            tl.store(Partial + s * BM * D + one, acc.to(Partial.dtype.element_ty))
            # -inf of a row that sees none of these keys
            tl.store(PartialLse + s * BM + r, m + tl.log2(norm))
            tl.debug_barrier()  # every thread has stored before one of them says so
            if tl.atomic_add(Arrived, 1) == parts - 1:
                m = tl.full([BM], HIDDEN, tl.float32)
                norm = tl.zeros([BM], tl.float32)
                acc = tl.zeros([BM, D], tl.float32)
                for p in range(parts):
                    value = tl.load(Partial + p * BM * D + one, cache_modifier=".cg").to(tl.float32)
                    lse = tl.load(PartialLse + p * BM + r, cache_modifier=".cg")
                    m_new = tl.maximum(m, lse)
                    old, new = tl.exp2(m - m_new), tl.exp2(lse - m_new)
                    acc = acc * old[:, None] + value * new[:, None]
                    norm = norm * old + new
                    m = m_new
                tl.store(at, (acc / norm[:, None]).to(Out.dtype.element_ty), mask=real[:, None])


@triton.jit
def _linear(
    q, Kh, Vh, S, Z, Out, t, real, begin, first, last, num_keys, k_t, v_t, o_t,
    SUMMED: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of linear queries.

    The chunks before that of the first (SUMMED: their sum), and the keys from there on.
    """
    d, pos = tl.arange(0, D), t + begin
    feature = phi(q.to(tl.float32)).to(q.dtype)
    chunks = (first + begin) // CHUNK
    at = d[:, None] * D + d[None, :]
    if SUMMED:
        s = tl.load(S + chunks * D * D + at)
        z = tl.load(Z + chunks * D + d)
    else:
        s = tl.zeros([D, D], tl.float32)
        z = tl.zeros([D], tl.float32)
        for c in range(0, chunks, 2):
            more = c + 1 < chunks
            s += tl.load(S + c * D * D + at).to(tl.float32)
            s += tl.load(S + (c + 1) * D * D + at, mask=more, other=0.0).to(tl.float32)
            z += tl.load(Z + c * D + d) + tl.load(Z + (c + 1) * D + d, mask=more, other=0.0)
    acc = tl.dot(
        feature.to(S.dtype.element_ty), s.to(S.dtype.element_ty), input_precision=PRECISION
    )
    den = tl.sum(feature.to(tl.float32) * z[None, :], 1) + EPSILON
    for n0 in range(chunks * CHUNK, last + begin + 1, BN):
        n = n0 + tl.arange(0, BN)
        k, v = load_rows(Kh, n, n < num_keys, k_t, D), load_rows(Vh, n, n < num_keys, v_t, D)
        a = tl.dot(feature, tl.trans(phi(k.to(tl.float32)).to(q.dtype)), input_precision=PRECISION)
        a = tl.where(n[None, :] <= pos[:, None], a, 0.0)
        den += tl.sum(a, 1)
        acc = tl.dot(a.to(v.dtype), v, acc, input_precision=PRECISION)
    at_out = Out + t[:, None].to(tl.int64) * o_t + d[None, :]
    tl.store(at_out, (acc / den[:, None]).to(Out.dtype.element_ty), mask=real[:, None])


@triton.jit
def work_kernel(
    Q, K, V, PlainQ, PlainK, Out, S, Z, Partial, PartialLse, Arrived, Order, Before, Starts,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t,
    H, GROUP, UNIT, T, NB, num_keys, NC, start, window, scale, segment, blocks,
    SINKS: tl.constexpr, STARTS: tl.constexpr, SPLIT: tl.constexpr, SUMMED: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (number, row of the tables).

    It takes items of the row's list at a fixed stride; in the list heads come fastest.
    """
    follow()
    u = tl.program_id(1).to(tl.int64)
    b = u // (H // UNIT)
    begin = start
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    counts = Before + u * 3 * (NB + 1) + NB
    num_full = (tl.load(counts) + BM - 1) // BM * SPLIT
    num_linear = (tl.load(counts + NB + 1) + BM - 1) // BM
    num_local = (tl.load(counts + 2 * (NB + 1)) + BM - 1) // BM
    for item in range(
        tl.program_id(0), (num_full + num_linear + num_local) * UNIT, tl.num_programs(0)
    ):
        h, x = u % (H // UNIT) * UNIT + item % UNIT, item // UNIT
        hk = h // GROUP
        Vh, Oh = V + b * v_b + hk * v_h, Out + b * o_b + h * o_h
        if x < num_full:  # the last block first: it sees most keys
            i, s = num_full // SPLIT - 1 - x // SPLIT, x % SPLIT
            t, real, first, last = gather_rows(Order, Before, u, 0, i, T, NB, True, BM)
            q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
            block = (b * H + h) * blocks + i
            _full(q, K + b * k_b + hk * k_h, Vh, Oh, Partial + block * SPLIT * BM * D,
                PartialLse + block * SPLIT * BM,
                  Arrived + block, t, real, begin, first, last, s, segment, num_keys, k_t, v_t,
                  o_t, scale, SPLIT, BM, BN, D,
                  PRECISION)  # fmt: skip
        elif x < num_full + num_local:
            t, real, first, last = gather_rows(Order, Before, u, 2, x - num_full, T, NB, True, BM)
            q = load_rows(Q + b * q_b + h * q_h, t, real, q_t, D)
            Kh = K + b * k_b + hk * k_h
            _, norm, acc = attend_band(q, Kh, Vh, first + begin, last + begin, num_keys, k_t, v_t,
                t + begin, window, scale,
                                       SINKS, BM, BN, D, PRECISION)  # fmt: skip
            at = Oh + t[:, None].to(tl.int64) * o_t + tl.arange(0, D)[None, :]
            tl.store(at, (acc / norm[:, None]).to(Out.dtype.element_ty), mask=real[:, None])
        else:
            i = num_linear - 1 - (x - num_full - num_local)
            t, real, first, last = gather_rows(Order, Before, u, 1, i, T, NB, True, BM)
            q = load_rows(PlainQ + b * pq_b + h * pq_h, t, real, pq_t, D)
            head = b * (H // GROUP) + hk
            _linear(q, PlainK + b * pk_b + hk * pk_h, Vh, S + head * NC * D * D, Z + head * NC * D,
                Oh, t, real, begin, first,
                    last, num_keys, pk_t, v_t, o_t, SUMMED, CHUNK, BM, BN, D,
                    PRECISION)  # fmt: skip


class Cut(NamedTuple):
    """How the work is cut for the device."""

    segment: int  # keys that a block of full queries sees in one item
    chunk: int  # keys whose sums are taken together
    block: int  # queries of a block, and keys of a tile
    warps: int
    stages: int
    per_sm: int  # programs on a multiprocessor; more than it holds take their turn
    registers: int | None  # of a thread, at most


def cut(num_keys: int, head_dim: int, dtype: torch.dtype) -> Cut:
    """What measured fastest on an H100."""
    segment, chunk = (
        (256, 64) if num_keys <= 1024 else (512, 128) if num_keys <= 2048 else (2048, 256)
    )
    if dtype == torch.float32:  # its products are not tensor-core ones: small tiles
        return Cut(segment, chunk, 32, 8 if head_dim > 32 else 4, 1, 2, None)
    if head_dim > 64:
        return Cut(min(segment, 1024), chunk, 64, 4, 1, 4, None)
    return Cut(segment, chunk, 64, 4, 3, 6, 168)
