# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Full attention of gathered queries on Hopper, by warps with roles; `launch_hopper` launches it.

One warp fetches tiles of keys and values (TMA) into a ring in shared memory. Each warp group takes
64 rows of a block of queries and issues the scores of a tile before it applies the weights of the
tile before, so that tensor cores and exponentials work at the same time. In Gluon, for which there
is no interpreter: `forward.full_kernel` computes the same from the same work items, for heads and
devices that this does not take.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bayes_router.attention.kernels.triton.launch import follow

ROWS = gl.constexpr(64)  # of a warp group
HIDDEN = gl.constexpr(-1.0e30)  # as `rows.HIDDEN`


@gluon.jit
def _record(Items, item, UNIT):
    record = Items + item // UNIT * 8
    return gl.load(record), gl.load(record + 2), gl.load(record + 3)


@gluon.jit
def _wait(barriers, tile, STAGES: gl.constexpr):
    """Until this tile is there."""
    mbarrier.wait(barriers.index(tile % STAGES), (tile // STAGES) & 1)


@gluon.jit
def _fetch(
    K, V, Items, total, programs, H, GROUP, UNIT, pipes, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of keys and values of every item, as soon as their places are free."""
    ring, ready, free = pipes
    tile = gl.to_tensor(0)
    for item in range(gl.program_id(0), total, programs):
        u, lo, hi = _record(Items, item, UNIT)
        b, hk = u // (H // UNIT), (u % (H // UNIT) * UNIT + item % UNIT) // GROUP
        # at least one tile, as the readers expect: an item may see no key
        for n in range(lo, gl.maximum(hi, lo + 1), BN):
            at, phase = tile % STAGES, (tile // STAGES + 1) & 1
            for x in gl.static_range(2):
                source = K if x == 0 else V
                mbarrier.wait(free[x].index(at), phase)
                mbarrier.expect(ready[x].index(at), BN * D * 2)
                tma.async_copy_global_to_shared(
                    source, [b, hk, n, 0], ready[x].index(at), ring[x].index(at)
                )
            tile += 1


@gluon.jit
def _soften(s, n0, pos, m, norm, scale, MASKED: gl.constexpr, BN: gl.constexpr):
    """Weights of raw scores s of keys n0 and on, and what they make of maxima and normalisers.

    Last, by how much earlier sums fade.
    """
    if MASKED:
        n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(gl.expand_dims(pos, 1) >= gl.expand_dims(n, 0), s, -float("inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    fade = gl.exp2(m - m_new)
    return p, m_new, norm * fade + gl.sum(p, 1), fade


@gluon.jit
def _score(q, ring, tile, s, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    k = ring[0].index(tile % STAGES).reshape([BN, D]).permute([1, 0])
    return warpgroup_mma(q, k, s, use_acc=False, is_async=True)


@gluon.jit
def _apply(p, ring, tile, acc, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    v = ring[1].index(tile % STAGES).reshape([BN, D])
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def _step(
    q, ring, ready, free, tile, n0, pos, p, m, norm, acc, scale, MASKED: gl.constexpr,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, scores: gl.constexpr,
    sums: gl.constexpr,
):  # fmt: skip
    """Scores of this tile, while the weights p of the one before are applied."""
    _wait(ready[0], tile, STAGES)
    s = _score(q, ring, tile, gl.zeros([ROWS, BN], gl.float32, scores), BN, D, STAGES)
    _wait(ready[1], tile - 1, STAGES)
    acc = _apply(p, ring, tile - 1, acc, BN, D, STAGES)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(free[0].index(tile % STAGES), count=1)
    weights, m, norm, fade = _soften(s, n0, pos, m, norm, scale, MASKED, BN)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(free[1].index((tile - 1) % STAGES), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, sums)), 1)
    p = gl.convert_layout(weights.to(p.dtype), gl.DotOperandLayout(0, sums, 2))
    return p, m, norm, acc


@gluon.jit
def _attend(
    outputs, tables, common, pipes, q_s, part_of_block, STARTS: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows of the block of each item."""
    ring, ready, free = pipes
    Q, Out, Lse, Partial, PartialLse = outputs
    Order, Before, Starts, Items, total, programs = tables
    q_b, q_h, q_t, o_b, o_h, o_t, H, UNIT, T, NB, start, scale = common
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = Q.dtype.element_ty
    d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, wide)), 0)
    own = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    tile = gl.to_tensor(0)
    for item in range(gl.program_id(0), total, programs):
        u, lo, hi = _record(Items, item, UNIT)
        record, j = Items + item // UNIT * 8, item % UNIT
        i, seen, part = gl.load(record + 1), gl.load(record + 4), gl.load(record + 5)
        b, h = u // (H // UNIT), u % (H // UNIT) * UNIT + j
        begin = start
        if STARTS:
            begin = gl.load(Starts + b).to(gl.int32)
        count, first = gl.load(Before + u * 3 * (NB + 1) + NB), i * BM + part_of_block * ROWS
        row, head, line = b.to(gl.int64), h.to(gl.int64), Order + u * 3 * T + first
        t = gl.expand_dims(gl.load(line + own, mask=first + own < count, other=0), 1).to(gl.int64)
        q_s.store(gl.load(Q + row * q_b + head * q_h + t * q_t + d))
        fence_async_shared()
        r = gl.arange(0, ROWS, layout=rows)
        pos = gl.load(line + r, mask=first + r < count, other=0) + begin
        # the first tile has nothing before it
        _wait(ready[0], tile, STAGES)
        s = _score(q_s, ring, tile, gl.zeros([ROWS, BN], gl.float32, scores), BN, D, STAGES)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(free[0].index(tile % STAGES), count=1)
        m, norm = gl.full([ROWS], HIDDEN, gl.float32, rows), gl.zeros([ROWS], gl.float32, rows)
        weights, m, norm, _ = _soften(s, lo, pos, m, norm, scale, True, BN)
        p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, sums, 2))
        acc = gl.zeros([ROWS, D], gl.float32, sums)
        tile += 1
        for n in range(lo + BN, seen, BN):
            p, m, norm, acc = _step(q_s, ring, ready, free, tile, n, pos, p, m, norm, acc, scale,
                                    False, BN, D, STAGES, scores, sums)  # fmt: skip
            tile += 1
        for n in range(gl.maximum(seen, lo + BN), hi, BN):
            p, m, norm, acc = _step(q_s, ring, ready, free, tile, n, pos, p, m, norm, acc, scale,
                                    True, BN, D, STAGES, scores, sums)  # fmt: skip
            tile += 1
        _wait(ready[1], tile - 1, STAGES)
        acc = _apply(p, ring, tile - 1, acc, BN, D, STAGES)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(free[1].index((tile - 1) % STAGES), count=1)
        kept = gl.convert_layout(gl.maximum(norm, 1e-30), gl.SliceLayout(1, sums))
        out = gl.convert_layout((acc / gl.expand_dims(kept, 1)).to(dtype), wide)
        lse = m + gl.log2(norm)
        if part < 0:
            real = gl.expand_dims(first + own < count, 1)
            gl.store(Out + row * o_b + head * o_h + t * o_t + d, out, mask=real)
            gl.store(Lse + (row * H + head) * T + pos - begin, lse, mask=first + r < count)
        else:
            slot = (part * UNIT + j).to(gl.int64) * BM + part_of_block * ROWS
            gl.store(Partial + gl.expand_dims(slot + own, 1) * D + d, out)
            gl.store(PartialLse + slot + r, lse)


@gluon.jit
def full_kernel(
    Q, K, V, Out, Lse, Partial, PartialLse, Order, Before, Starts, Items, Counters, q_b, q_h, q_t,
    o_b, o_h, o_t, H, GROUP, UNIT, T, NB, start, scale, programs,
    STARTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `forward.full_kernel`, BM = 128; K and V are descriptors of tiles [1, 1, BN, D].

    A program takes items at a fixed stride, longest first.
    """
    gl.static_assert(BM == 2 * ROWS)
    follow()
    total = gl.load(Counters)
    dtype: gl.constexpr = Q.dtype.element_ty
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], K.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], V.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_s = gl.allocate_shared_memory(dtype, [2, ROWS, D], flat)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(x), count=1)
        mbarrier.init(v_ready.index(x), count=1)
        mbarrier.init(k_free.index(x), count=2)
        mbarrier.init(v_free.index(x), count=2)
    fence_async_shared()
    pipes = ((ks, vs), (k_ready, v_ready), (k_free, v_free))  # tiles; there; to be written over
    tables = (Order, Before, Starts, Items, total, programs)
    common = (q_b, q_h, q_t, o_b, o_h, o_t, H, UNIT, T, NB, start, scale)
    outputs = (Q, Out, Lse, Partial, PartialLse)
    gl.warp_specialize(
        [
            (_attend, (outputs, tables, common, pipes, q_s.index(0), 0, STARTS, BM, BN, D, STAGES)),
            (_attend, (outputs, tables, common, pipes, q_s.index(1), 1, STARTS, BM, BN, D, STAGES)),
            (_fetch, (K, V, Items, total, programs, H, GROUP, UNIT, pipes, BN, D, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
