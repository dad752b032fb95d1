# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""What the backend `short` does: hard routing of short texts on the GPU in two launches."""

from typing import Any

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Kernel
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels.capability import LOG2_E, ceil_div, packed, padded, power_of_2
from bayes_router.attention.kernels.triton.call import (
    multiprocessors,
    output,
    precision,
    strides,
)
from bayes_router.attention.kernels.triton.launch import launch
from bayes_router.attention.kernels.triton.launch_linear import empty_states, prefix
from bayes_router.attention.kernels.triton.plan import empty_plan
from bayes_router.attention.kernels.triton.short import cut, prepare_kernel, work_kernel


def launch_short(problem: RoutedProblem) -> Tensor:
    """[B, H, Tq, Dh] of a checked problem on CUDA.

    Built-in experts, each at most once, few queries, no gradients.
    """
    # kernels run on the current device, whatever their tensors are on
    with torch.cuda.device_of(problem.q):
        return _attend(problem)


def _attend(problem: RoutedProblem) -> Tensor:
    head_dim = problem.q.shape[3]
    q, k, v = (packed(padded(x)) for x in (problem.q, problem.k, problem.v))
    # phi(-inf) = 0
    plain_q, plain_k = (packed(padded(x, -torch.inf)) for x in (problem.plain_q, problem.plain_k))
    (B, H, T, D), (_, HK, num_keys, _), device = q.shape, k.shape, q.device
    R, U, unit = problem.units, B * problem.units, H // problem.units
    kernels = {expert.kernel: index for index, expert in problem.computed()}
    full, linear, local = (
        kernels.get(kernel, -1) for kernel in (Kernel.FULL, Kernel.LINEAR, Kernel.LOCAL)
    )
    window, sinks = problem.experts[local].shape[2:] if local >= 0 else (1, 0)
    route, starts, lengths = problem.route, problem.starts, problem.lengths
    out = output(q, lengths is None and len(kernels) == len(problem.experts))
    if not out.numel():
        return out[..., :head_dim]
    segment, chunk, block, warps, stages, per_sm, registers = cut(num_keys, D, q.dtype)
    split, blocks, chunks = (
        ceil_div(num_keys, segment),
        ceil_div(T, block),
        ceil_div(num_keys, chunk),
    )
    order, before = empty_plan(route)
    s, z = empty_states(plain_k, chunk)
    slots = B * H * blocks if split > 1 else 0
    partial = torch.empty(slots * split, block, D, device=device, dtype=q.dtype)
    partial_lse = torch.empty(slots * split, block, device=device, dtype=torch.float32)
    arrived = torch.empty(slots, device=device, dtype=torch.int32)
    fixed: dict[str, Any] = {
        "CHUNK": chunk,
        "BN": min(block, chunk),
        "D": D,
        "PRECISION": precision(q),
    }
    fixed |= {"num_warps": warps, "num_stages": stages}
    launch(
        prepare_kernel, (3 * U + (B * HK * chunks if linear >= 0 else 0),),
        route, route if lengths is None else lengths, order, before, plain_k, v, s, z, arrived,
        *route.stride(), *strides(plain_k, v), full, linear, local, len(problem.experts), U, R, HK,
        T, before.shape[2] - 1,
        num_keys, chunks, slots // U, PADDED=lengths is not None, BLOCK=power_of_2(T),
        **fixed,
        sanitize_overflow=False,
    )  # fmt: skip
    if D > 64 and linear >= 0:
        prefix(s, z, num_keys, chunk)
    launch(
        work_kernel, (max(1, min(per_sm * multiprocessors(device) // U,
            (blocks * split + 2) * unit)), U),
        q, k, v, plain_q, plain_k, out, s, z, partial, partial_lse, arrived, order, before,
        before if starts is None else starts,
        *strides(q, k, v, plain_q, plain_k, out), H, H // HK, unit, T, before.shape[2] - 1,
        num_keys, chunks, num_keys - T,
        window, LOG2_E / head_dim**0.5, segment, blocks, SINKS=sinks, STARTS=starts is not None,
        SPLIT=split, SUMMED=D > 64,
        BM=block, **fixed, **({} if registers is None else {"maxnreg": registers}),
    )  # fmt: skip
    return out[..., :head_dim]
