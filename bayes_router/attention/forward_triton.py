"""Triton kernels of the routed forward pass; `backend_triton` launches them.

Each program takes a block of queries of one kind, gathered by the order of `plan_triton`, so that its rows cost the same. Softmax is
taken online in base 2. Besides the output each row leaves `Lse`: log2 of its softmax normaliser, or its denominator under
linear attention; the backward pass reads it.
"""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)  # of linear attention's denominator, as in `linear.EPSILON`
HIDDEN = tl.constexpr(-1.0e30)  # below every score, and finite: a row without visible keys gets weight 0, not NaN


@triton.jit
def phi(x):
    """The feature map elu(x) + 1, in float32."""
    return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def gather_rows(Order, Before, b, kind, block, T, NB, BM: tl.constexpr):
    """Tokens of a block of one kind [BM], which of them exist, and the first and last."""
    row = b * 3 + kind
    count = tl.load(Before + row * (NB + 1) + NB)
    r = block * BM + tl.arange(0, BM)
    real = r < count
    t = tl.load(Order + row * T + r, mask=real, other=0)
    return t, real, tl.min(tl.where(real, t, 2147483647), 0), tl.max(t, 0)


@triton.jit
def _soften(s, v, n, pos, low, m, l, acc, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of online softmax: raw scores s of keys n, visible from `low` to `pos`."""
    if MASKED:
        s = tl.where((n[None, :] <= pos[:, None]) & (n[None, :] >= low[:, None]), s * scale, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l, acc


@triton.jit
def _tile(q, K, V, n0, num_keys, k_t, v_t, pos, low, m, l, acc, scale, MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Keys n0 .. n0 + BN, loaded by address."""
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
    return _soften(s, v, n, pos, low, m, l, acc, scale, MASKED, PRECISION)


@triton.jit
def _bulk_tile(q, K, V, b, h, n0, pos, low, m, l, acc, scale, MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Keys n0 .. n0 + BN, loaded by the tensor copy engine from descriptors [B, Hkv, Tk, D]; zeros past the end."""
    k = K.load([b, h, n0, 0]).reshape(BN, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    v = V.load([b, h, n0, 0]).reshape(BN, D)
    return _soften(s, v, n0 + tl.arange(0, BN), pos, low, m, l, acc, scale, MASKED, PRECISION)


@triton.jit
def find_item(Table, item, B, H, S: tl.constexpr, GROUPS: tl.constexpr):
    """A work item of full attention: (head, row, block, segment, slot for its partial result)."""
    h, u = item % H, item // H
    g = tl.arange(0, GROUPS)
    inside = g < 2 * B * S
    ends = tl.load(Table + g, mask=inside, other=2147483647)
    group = tl.sum((ends <= u).to(tl.int32), 0)
    begin = tl.max(tl.where(ends <= u, ends, 0), 0)
    i = tl.load(Table + 2 * B * S + group) + u - begin
    short = group >= B * S
    x = tl.where(short, group - B * S, group)
    b = tl.where(short, x % B, x // S)
    s = tl.where(short, S - 1 - x // B, x % S)
    return h, b, i, s


@triton.jit
def full_kernel(
    Q, K, V, KBulk, VBulk, Out, Lse, Partial, PartialLse, Order, Before, Starts, Table, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    o_b, o_h, o_t, B, H, GROUP, T, NB, num_keys, start, scale, programs,
    STARTS: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, BULK: tl.constexpr, WS: tl.constexpr = False,
):  # fmt: skip
    """Full attention: programs stay resident and take items off the table, longest first."""
    meta = Table + 4 * B * S
    L, total = tl.load(meta), tl.load(meta + 1)
    d = tl.arange(0, D)
    item = tl.program_id(0)
    while item < total:
        following = tl.atomic_add(meta + 2, 1) + programs
        h, b, i, s = find_item(Table, item, B, H, S, GROUPS)
        begin = start
        if STARTS:
            begin = tl.load(Starts + b).to(tl.int32)
        t, real, first, last = gather_rows(Order, Before, b, 0, i, T, NB, BM)
        pos = t + begin
        row = b.to(tl.int64)
        q = tl.load(Q + row * q_b + h.to(tl.int64) * q_h + t[:, None].to(tl.int64) * q_t + d[None, :])
        Kh = K + row * k_b + (h // GROUP).to(tl.int64) * k_h
        Vh = V + row * v_b + (h // GROUP).to(tl.int64) * v_h
        m = tl.full([BM], HIDDEN, tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        low = tl.zeros([BM], tl.int32)
        lo, hi = s * L, tl.minimum((s + 1) * L, last + begin + 1)
        seen = tl.maximum(tl.minimum((first + begin + 1) // BN * BN, hi // BN * BN), lo)  # by every row of the block
        if BULK:
            for n in tl.range(lo, seen, BN, warp_specialize=WS):
                m, l, acc = _bulk_tile(q, KBulk, VBulk, b, h // GROUP, n, pos, low, m, l, acc, scale, False, BN, D, PRECISION)
            for n in tl.range(seen, hi, BN):
                m, l, acc = _bulk_tile(q, KBulk, VBulk, b, h // GROUP, n, pos, low, m, l, acc, scale, True, BN, D, PRECISION)
        else:
            for n in range(lo, seen, BN):
                m, l, acc = _tile(q, Kh, Vh, n, num_keys, k_t, v_t, pos, low, m, l, acc, scale, False, BN, D, PRECISION)
            for n in range(seen, hi, BN):
                m, l, acc = _tile(q, Kh, Vh, n, num_keys, k_t, v_t, pos, low, m, l, acc, scale, True, BN, D, PRECISION)
        acc = acc / tl.maximum(l, 1e-30)[:, None]
        lse = m + tl.log2(l)
        j = tl.minimum(tl.maximum(L - begin, 0) // 64, NB)
        unsplit = (i < tl.load(Before + b * 3 * (NB + 1) + j) // BM) | (S == 1)
        if unsplit:
            at = Out + row * o_b + h.to(tl.int64) * o_h + t[:, None].to(tl.int64) * o_t + d[None, :]
            tl.store(at, acc.to(Out.dtype.element_ty), mask=real[:, None])
            tl.store(Lse + (row * H + h) * T + t, lse, mask=real)
        else:
            r = tl.arange(0, BM)
            slot = item.to(tl.int64) * BM
            tl.store(Partial + (slot + r[:, None]) * D + d[None, :], acc.to(Partial.dtype.element_ty))
            tl.store(PartialLse + slot + r, lse)
        item = following


@triton.jit
def combine_kernel(
    Partial, PartialLse, Out, Lse, Order, Before, Starts, Table, o_b, o_h, o_t, B, H, T, NB, start,
    STARTS: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Join the partial results of a split block: weighed by their normalisers, or summed (SUM, gradients of queries)."""
    i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = start
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    counts = Before + b * 3 * (NB + 1)
    L = tl.load(Table + 4 * B * S)
    blocks = (tl.load(counts + NB) + BM - 1) // BM
    one = tl.load(counts + tl.minimum(tl.maximum(L - begin, 0) // 64, NB)) // BM
    if (i < blocks) & (i >= one):
        t, real, _, _ = gather_rows(Order, Before, b, 0, i, T, NB, BM)
        d, r = tl.arange(0, D), tl.arange(0, BM)
        m = tl.full([BM], HIDDEN, tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        go, s = 1, 0
        while go == 1:
            after = tl.load(counts + tl.minimum(tl.maximum((s + 1) * L - begin, 0) // 64, NB)) // BM
            go = ((i >= after) & (s < S - 1)).to(tl.int32)  # another segment follows: this one has all its keys
            group = tl.where(go == 1, b * S + s, B * S + (S - 1 - s) * B + b)
            offset = tl.load(Table + group - 1, mask=group > 0, other=0)
            u = offset + i - tl.load(Table + 2 * B * S + group)
            slot = (u * H + h).to(tl.int64) * BM
            x = tl.load(Partial + (slot + r[:, None]) * D + d[None, :]).to(tl.float32)
            if SUM:
                acc += x
            else:
                lse = tl.load(PartialLse + slot + r)
                m_new = tl.maximum(m, lse)
                old, new = tl.exp2(m - m_new), tl.exp2(lse - m_new)
                acc = acc * old[:, None] + x * new[:, None]
                l = l * old + new
                m = m_new
            s += 1
        if not SUM:
            acc = acc / l[:, None]
            tl.store(Lse + (b.to(tl.int64) * H + h) * T + t, m + tl.log2(l), mask=real)
        at = Out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + t[:, None].to(tl.int64) * o_t + d[None, :]
        tl.store(at, acc.to(Out.dtype.element_ty), mask=real[:, None])


@triton.jit
def local_kernel(
    Q, K, V, Out, Lse, Order, Before, Starts, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H, GROUP, T, NB, num_keys, start, window, scale,
    STARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Windowed attention of a block of sorted local queries, over the hull of their windows."""
    h, i, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if i * BM >= tl.load(Before + (b * 3 + 2) * (NB + 1) + NB):
        return
    begin = start
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    t, real, first, last = gather_rows(Order, Before, b, 2, i, T, NB, BM)
    pos, d = t + begin, tl.arange(0, D)
    q = tl.load(Q + b * q_b + h * q_h + t[:, None].to(tl.int64) * q_t + d[None, :])
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    m = tl.full([BM], HIDDEN, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    low = pos - window + 1
    for n in range(tl.maximum(first + begin - window + 1, 0) // BN * BN, last + begin + 1, BN):
        m, l, acc = _tile(q, K, V, n, num_keys, k_t, v_t, pos, low, m, l, acc, scale, True, BN, D, PRECISION)
    at = Out + b * o_b + h * o_h + t[:, None].to(tl.int64) * o_t + d[None, :]
    tl.store(at, (acc / l[:, None]).to(Out.dtype.element_ty), mask=real[:, None])
    tl.store(Lse + (b * H + h) * T + t, m + tl.log2(l), mask=real)
