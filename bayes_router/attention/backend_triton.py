"""The backend `triton`: launches the kernels of the routed forward and backward pass. Static shapes, no host synchronisation.

An expert that is not one of the built-in three computes its own rows (`Expert.attend_rows`), and so does a second local expert.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bayes_router.attention import forward_triton, linear_triton
from bayes_router.attention.call_triton import (
    LOG2_E,
    Call,
    Tiles,
    chunk_size,
    combine,
    empty,
    multiprocessors,
    partials,
    precision,
    prefix,
    strides,
    tiles,
)
from bayes_router.attention.full import FullAttention
from bayes_router.attention.gradient_triton import backward
from bayes_router.attention.launch_triton import launch
from bayes_router.attention.linear import LinearAttention
from bayes_router.attention.local import LocalAttention
from bayes_router.attention.plan_triton import make_plan, make_schedule
from bayes_router.attention.problem import RoutedProblem

KINDS = (FullAttention, LinearAttention, LocalAttention)  # in the order of plan_triton


def attend(problem: RoutedProblem) -> Tensor:
    """[B, H, Tq, Dh] of a checked problem on CUDA."""
    native = native_experts(problem)
    head_dim = problem.q.shape[3]
    out = _attend_native(_padded(problem), native)[..., :head_dim]
    for index, expert in problem.computed():
        if index not in native:
            chosen = problem.route == index
            rows = expert.attend_rows(*problem.inputs(expert), chosen)
            out = torch.where(chosen[:, None, :, None], rows, out)
    return out


def native_experts(problem: RoutedProblem) -> tuple[int, int, int]:
    """Index among the experts of the one that each kind of kernel computes; -1 where there is none."""
    indices = [-1, -1, -1]
    for index, expert in problem.computed():
        if type(expert) in KINDS and indices[KINDS.index(type(expert))] < 0:
            indices[KINDS.index(type(expert))] = index
    return indices[0], indices[1], indices[2]


def _padded(problem: RoutedProblem) -> RoutedProblem:
    """Head size up to a power of two, at least 16: zeros, and for linear attention -inf, which its feature map sends to 0."""
    head_dim = problem.q.shape[3]
    extra = max(triton.next_power_of_2(head_dim), 16) - head_dim

    def pad(x: Tensor, value: float = 0.0) -> Tensor:
        x = F.pad(x, (0, extra), value=value) if extra else x
        return x if x.stride(3) == 1 else x.contiguous()

    q, k = pad(problem.q), pad(problem.k)
    same = not extra and problem.plain_q is problem.q, not extra and problem.plain_k is problem.k
    plain_q = q if same[0] else pad(problem.plain_q, -torch.inf)
    plain_k = k if same[1] else pad(problem.plain_k, -torch.inf)
    return replace(problem, q=q, k=k, v=pad(problem.v), plain_q=plain_q, plain_k=plain_k)


def _attend_native(problem: RoutedProblem, native: tuple[int, int, int]) -> Tensor:
    q, k = problem.q, problem.k
    plan = make_plan(problem.route, native, len(problem.experts), problem.lengths)
    sizes = tiles(q.shape[3], q.dtype)
    programs = sizes.per_sm * multiprocessors(q.device)
    tile = sizes.full["BM"], sizes.full["BN"]
    schedule = make_schedule(plan, q.shape[1], k.shape[2], problem.starts, tile, programs)
    window = problem.experts[native[2]].shape.window if native[2] >= 0 else 1
    true_dim = problem.experts[0].shape.head_dim
    covered = problem.lengths is None and all(index in native for index in range(len(problem.experts)))
    scale, start = LOG2_E / true_dim**0.5, k.shape[2] - q.shape[2]
    call = Call(plan, schedule, native, window, scale, problem.starts, start, covered, sizes, programs)
    inputs = (q, k, problem.v, problem.plain_q, problem.plain_k)
    if not problem.needs_grad:
        return forward(call, *inputs)[0]
    out: Tensor = _RoutedAttention.apply(call, *inputs)
    return out


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor) -> Tensor:
        out, lse, state = forward(call, q, k, v, plain_q, plain_k)
        ctx.call = call
        ctx.save_for_backward(q, k, v, plain_q, plain_k, out, lse, *state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, plain_q, plain_k, out, lse, *state = ctx.saved_tensors
        dout = gradients[0] if gradients[0].stride(3) == 1 else gradients[0].contiguous()
        return None, *backward(ctx.call, q, k, v, plain_q, plain_k, out, lse, state, dout)


def forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(out, lse [B, H, Tq], linear state before each chunk)."""
    B, H, T, D = q.shape
    out = empty(q, call.covered)
    lse = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
    plan, blocks = call.plan, call.plan.before.shape[2] - 1
    starts = plan.before if call.starts is None else call.starts
    fixed: dict[str, Any] = {"D": D, "PRECISION": precision(q)}
    common = (H, H // k.shape[1], T, blocks, k.shape[2], call.start)
    local = {**fixed, "STARTS": call.starts is not None, **call.tiles.local}
    linear = {**fixed, "STARTS": call.starts is not None, **call.tiles.linear}
    state: tuple[Tensor, ...] = ()
    if call.native[0] >= 0:
        _launch_full(call, q, k, v, out, lse, starts, common, fixed)
    if call.native[2] >= 0:
        launch(
            forward_triton.local_kernel, (H, triton.cdiv(T, local["BM"]), B),
            q, k, v, out, lse, plan.order, plan.before, starts, *strides(q, k, v, out), *common, call.window,
            call.scale, **local,
        )  # fmt: skip
    if call.native[1] >= 0:
        state = linear_state(plain_k, v, call.tiles)
        launch(
            linear_triton.linear_kernel, (H, triton.cdiv(T, linear["BM"]), B),
            plain_q, plain_k, v, out, lse, *state, plan.order, plan.before, starts, *strides(plain_q, plain_k, v, out),
            *common, state[0].shape[2], CHUNK=chunk_size(k.shape[2]), **linear,
        )  # fmt: skip
    return out, lse, state


def _launch_full(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, common: tuple[int, ...],
    fixed: dict[str, Any],
) -> None:  # fmt: skip
    sizes, schedule, plan = call.tiles.full, call.schedule, call.plan
    partial, partial_lse = partials(schedule, sizes["BM"], q)
    launch(
        forward_triton.full_kernel, (call.programs,),
        q, k, v, out, lse, partial, partial_lse, plan.order, plan.before, starts, schedule.items, schedule.counters,
        *strides(q, k, v, out), *common, call.scale, call.programs, STARTS=call.starts is not None, **fixed, **sizes,
    )  # fmt: skip
    combine(call, partial, partial_lse, out, lse, sizes["BM"], add=False)


def linear_state(k: Tensor, v: Tensor, sizes: Tiles) -> tuple[Tensor, Tensor]:
    """State before each chunk of keys: S [B, Hkv, NC, D, D] and z [B, Hkv, NC, D]."""
    B, H, T, D = k.shape
    chunk = chunk_size(T)
    count = triton.cdiv(T, chunk)
    wide = torch.float32 if k.dtype == torch.float32 else torch.bfloat16
    s = torch.empty(B, H, count, D, D, device=k.device, dtype=wide)
    z = torch.empty(B, H, count, D, device=k.device, dtype=torch.float32)
    launch(
        linear_triton.chunk_kernel, (count, H, B),
        k, v, s, z, *strides(k, v), H, T, count, CHUNK=chunk, D=D, PRECISION=precision(k),
        **{key: value for key, value in {**sizes.chunk, "BN": min(chunk, sizes.chunk["BN"])}.items() if key != "BM"},
    )  # fmt: skip
    prefix(s, z, reverse=False)
    return s, z
