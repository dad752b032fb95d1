# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Hard routing of short texts on the GPU in one launch: no plan, no sorting, no state.

A program takes BM consecutive queries of one head and runs over their keys once. Each row has weights of its own kind: the
exponentials of online softmax for `full` and `local` (which see all keys, or the window), phi(q) phi(k)^T for `linear`; so one
accumulator and one normaliser serve all rows:

    out[t] = sum_s weight[t, s] v[s] / (sum_s weight[t, s] + (EPSILON where linear))

Work is quadratic also for linear and local rows, unless no row of a block needs the keys: below a few thousand tokens it takes
less time than the launches of the sorted kernels. Forward only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.forward_triton import EPSILON, HIDDEN, phi
from bayes_router.attention.launch_triton import launch
from bayes_router.attention.problem import BUILT_IN, RoutedProblem

LOG2_E = 1.4426950408889634


@triton.jit
def _keys(q, feature, K, PlainK, V, n0, num_keys, k_t, pk_t, v_t, pos, reach, on_linear, m, norm, acc, scale,
          SOFT: tl.constexpr, LINEAR: tl.constexpr, SINKS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Keys n0 .. n0 + BN for rows at `pos`; `reach` is how many keys back a softmax row sees, 0 for a linear one."""
    n, d = n0 + tl.arange(0, BN), tl.arange(0, D)
    inside = (n < num_keys)[:, None]
    v = tl.load(V + n[:, None] * v_t + d[None, :], mask=inside, other=0.0)
    weight = tl.zeros([q.shape[0], BN], tl.float32)
    if SOFT:
        k = tl.load(K + n[:, None] * k_t + d[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        age = (pos[:, None] - n[None, :]).to(tl.uint32, bitcast=True)  # of a later key, a huge number
        back = reach[:, None]
        if SINKS:
            back = tl.where((n < SINKS)[None, :] & (back > 0), 2147483647, back)
        s = tl.where(age < back.to(tl.uint32), s * scale, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))  # of a linear row HIDDEN, for ever: it is never scaled
        weight = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        norm = norm * alpha
        acc = acc * alpha[:, None]
        m = m_new
    if LINEAR:
        plain = tl.load(PlainK + n[:, None] * pk_t + d[None, :], mask=inside, other=0.0)
        a = tl.dot(feature, tl.trans(phi(plain.to(tl.float32)).to(feature.dtype)), input_precision=PRECISION)
        weight = tl.where(on_linear[:, None] & (n[None, :] <= pos[:, None]), a, weight)
    norm += tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
    return m, norm, acc


@triton.jit(debug=True)  # keeps the assertion: a route out of range must not pass silently
def short_kernel(
    Q, K, V, PlainQ, PlainK, Out, Route, Starts, Lengths,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, pq_b, pq_h, pq_t, pk_b, pk_h, pk_t, o_b, o_h, o_t, r_b, r_t,
    GROUP, T, num_keys, start, window, full, linear, local, num_experts, scale,
    SINKS: tl.constexpr, STARTS: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block, head, row of the batch); the last blocks, which see most keys, start first."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t, d = i * BM + tl.arange(0, BM), tl.arange(0, D)
    begin = start
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    length = T
    if PADDED:
        length = tl.load(Lengths + b).to(tl.int32)
    real = t < length
    route = tl.load(Route + b * r_b + t.to(tl.int64) * r_t, mask=real, other=-2).to(tl.int32)
    wrong = real & ((route < 0) | (route >= num_experts))
    tl.device_assert(tl.sum(wrong.to(tl.int32), 0) == 0, "route out of range")
    on_full, on_linear, on_local = (route == full) & real, (route == linear) & real, (route == local) & real
    reach = tl.where(on_full, 2147483647, tl.where(on_local, window, 0))
    pos = t + begin

    any_full, any_linear = tl.max(on_full.to(tl.int32), 0) > 0, tl.max(on_linear.to(tl.int32), 0) > 0
    any_soft = tl.max(reach, 0) > 0
    end = begin + tl.minimum(i * BM + BM, length)  # keys that some row sees end here
    near = tl.maximum(i * BM + begin - window + 1, 0) // BN * BN
    first = tl.where(any_soft, tl.where(any_full, 0, near), (end + BN - 1) // BN * BN)  # of those that a softmax row sees
    linear_from = tl.where(any_linear, 0, first)
    both_from, both_to = first, tl.where(any_linear, end, first)
    if SINKS:  # their tiles, before those from `first`, where local rows look no further back
        sunk = tl.where(any_soft, tl.minimum((SINKS + BN - 1) // BN * BN, first), 0)
        linear_from, both_from = tl.maximum(linear_from, sunk), first - sunk

    inside = (t < T)[:, None]
    row = t[:, None].to(tl.int64)
    q = tl.load(Q + b * q_b + h * q_h + row * q_t + d[None, :], mask=inside, other=0.0)
    plain = tl.load(PlainQ + b * pq_b + h * pq_h + row * pq_t + d[None, :], mask=inside, other=0.0)
    feature = phi(plain.to(tl.float32)).to(q.dtype)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    PlainK += b * pk_b + h // GROUP * pk_h
    m = tl.full([BM], HIDDEN, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n in range(linear_from, first, BN):
        m, norm, acc = _keys(q, feature, K, PlainK, V, n, num_keys, k_t, pk_t, v_t, pos, reach, on_linear, m, norm, acc, scale,
                             False, True, SINKS, BN, D, PRECISION)  # fmt: skip
    for x in range(both_from, both_to, BN):
        n = tl.where(x < first, x - both_from, x) if SINKS else x
        m, norm, acc = _keys(q, feature, K, PlainK, V, n, num_keys, k_t, pk_t, v_t, pos, reach, on_linear, m, norm, acc, scale,
                             True, True, SINKS, BN, D, PRECISION)  # fmt: skip
    for n in range(tl.maximum(both_to, first), end, BN):
        m, norm, acc = _keys(q, feature, K, PlainK, V, n, num_keys, k_t, pk_t, v_t, pos, reach, on_linear, m, norm, acc, scale,
                             True, False, SINKS, BN, D, PRECISION)  # fmt: skip
    norm = tl.where(on_linear, norm + EPSILON, tl.maximum(norm, 1e-30))
    taken = (on_full | on_linear | on_local)[:, None]
    out = tl.where(taken, acc / norm[:, None], 0.0)
    tl.store(Out + b * o_b + h * o_h + row * o_t + d[None, :], out.to(Out.dtype.element_ty), mask=inside)


def _padded(x: Tensor, extra: int, value: float = 0.0) -> Tensor:
    """The head size grown by `extra`, and contiguous along it."""
    x = F.pad(x, (0, extra), value=value) if extra else x
    return x if x.stride(3) == 1 else x.contiguous()


def attend(problem: RoutedProblem) -> Tensor:
    """[B, H, Tq, Dh] of a checked problem on CUDA: built-in experts, each at most once, no gradients."""
    with torch.cuda.device_of(problem.q):  # the kernel runs on the current device, whatever its tensors are on
        return _attend(problem)


def _attend(problem: RoutedProblem) -> Tensor:
    head_dim = problem.q.shape[3]
    extra = max(triton.next_power_of_2(head_dim), 16) - head_dim
    q, k, v = (_padded(x, extra) for x in (problem.q, problem.k, problem.v))
    plain_q, plain_k = (_padded(x, extra, -torch.inf) for x in (problem.plain_q, problem.plain_k))  # phi(-inf) = 0
    (B, H, T, D), num_keys = q.shape, k.shape[2]
    kinds = {type(expert): index for index, expert in problem.computed()}
    full, linear, local = (kinds.get(kind, -1) for kind in BUILT_IN)
    window, sinks = problem.experts[local].shape[2:] if local >= 0 else (1, 0)
    out = torch.empty_like(q)
    route, starts, lengths = problem.route, problem.starts, problem.lengths
    wide = q.dtype == torch.float32
    block = 32 if wide else 64  # float32 is not for tensor cores here: smaller tiles
    if out.numel():
        launch(
            short_kernel, (triton.cdiv(T, block), H, B),
            q, k, v, plain_q, plain_k, out, route, route if starts is None else starts, route if lengths is None else lengths,
            *(stride for x in (q, k, v, plain_q, plain_k, out) for stride in x.stride()[:3]), *route.stride(),
            H // k.shape[1], T, num_keys, num_keys - T, window, full, linear, local, len(problem.experts),
            LOG2_E / head_dim**0.5,
            SINKS=sinks, STARTS=starts is not None, PADDED=lengths is not None, BM=block, BN=block, D=D,
            PRECISION="ieee" if wide else "tf32",
            num_warps=4, num_stages=1 if wide else 2 if D > 64 else 3, sanitize_overflow=False,
        )  # fmt: skip
    return out[..., :head_dim]
