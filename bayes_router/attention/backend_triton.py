"""The backend `triton`: launches the kernels of the routed forward and backward pass. Static shapes, no host synchronisation.

An expert that is not one of the built-in three computes its own rows (`Expert.attend_rows`), and so does a second local expert.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from bayes_router.attention import backward_triton as backward_kernels
from bayes_router.attention import forward_triton, linear_triton
from bayes_router.attention.expert import Expert
from bayes_router.attention.full import FullAttention
from bayes_router.attention.linear import LinearAttention
from bayes_router.attention.local import LocalAttention
from bayes_router.attention.plan_triton import Plan, Schedule, make_plan, make_schedule
from bayes_router.attention.problem import RoutedProblem

KINDS = (FullAttention, LinearAttention, LocalAttention)  # in the order of plan_triton
LOG2_E = 1.4426950408889634
MAX_CHUNKS = 256


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and warps of the kernels, by head size and dtype."""

    full: dict[str, int]
    light: dict[str, int]
    per_sm: int  # resident programs of the full kernel


def tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """What measured fastest on an H100; float32 takes small tiles, its products are not tensor-core ones."""
    if dtype == torch.float32:
        small = {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
        return Tiles({**small, "BULK": False}, small, 2)
    light = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2}
    if head_dim > 64:
        return Tiles({"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3, "BULK": True}, light, 1)
    return Tiles({"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 3, "BULK": True}, light, 2)


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


@dataclass(frozen=True)
class Call:
    """What every launch of one pass needs beside the tensors."""

    plan: Plan
    schedule: Schedule
    native: tuple[int, int, int]
    window: int
    scale: float  # 1 / sqrt(Dh) of the unpadded head size, times log2(e)
    starts: Tensor | None
    start: int
    covered: bool  # every row is written by one of the kernels
    tiles: Tiles
    programs: int


def _attend_native(problem: RoutedProblem, native: tuple[int, int, int]) -> Tensor:
    q, k = problem.q, problem.k
    plan = make_plan(problem.route, native, len(problem.experts), problem.lengths)
    sizes = tiles(q.shape[3], q.dtype)
    programs = sizes.per_sm * multiprocessors(q.device)
    schedule = make_schedule(plan, q.shape[1], k.shape[2], problem.starts, sizes.full["BM"], programs)
    window = problem.experts[native[2]].shape.window if native[2] >= 0 else 1
    true_dim = problem.experts[0].shape.head_dim
    covered = problem.lengths is None and all(index in native for index in range(len(problem.experts)))
    call = Call(
        plan, schedule, native, window, LOG2_E / true_dim**0.5, problem.starts, k.shape[2] - q.shape[2], covered, sizes, programs
    )
    inputs = (q, k, problem.v, problem.plain_q, problem.plain_k)
    if not problem.needs_grad:
        return forward(call, *inputs)[0]
    out: Tensor = _RoutedAttention.apply(call, *inputs)  # type: ignore[no-untyped-call]
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


def multiprocessors(device: torch.device) -> int:
    """How many the device has; 1 for tensors that the interpreter runs on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _empty(like: Tensor, covered: bool) -> Tensor:
    return torch.empty_like(like) if covered else torch.zeros_like(like)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _strides(*xs: Tensor) -> list[int]:
    return [stride for x in xs for stride in x.stride()[:3]]


def chunk_size(num_keys: int) -> int:
    """Tokens between two kept states: short enough for the reads, long enough for the running sum of MAX_CHUNKS states."""
    return max(64 if num_keys <= 1024 else 128 if num_keys <= 8192 else 256, triton.next_power_of_2(-(-num_keys // MAX_CHUNKS)))


def forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(out, lse [B, H, Tq], linear state before each chunk)."""
    B, H, T, D = q.shape
    out = _empty(q, call.covered)
    lse = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
    plan, blocks = call.plan, call.plan.before.shape[2] - 1
    starts = plan.before if call.starts is None else call.starts
    fixed: dict[str, Any] = {"D": D, "PRECISION": _precision(q)}
    common = (H, H // k.shape[1], T, blocks, k.shape[2], call.start)
    light = {**fixed, "STARTS": call.starts is not None, **call.tiles.light}
    grid = (H, triton.cdiv(T, light["BM"]), B)
    state: tuple[Tensor, ...] = ()
    if call.native[0] >= 0:
        _launch_full(call, q, k, v, out, lse, starts, common, fixed)
    if call.native[2] >= 0:
        forward_triton.local_kernel[grid](
            q, k, v, out, lse, plan.order, plan.before, starts, *_strides(q, k, v, out), *common, call.window, call.scale, **light
        )
    if call.native[1] >= 0:
        state = linear_state(plain_k, v)
        linear_triton.linear_kernel[grid](
            plain_q, plain_k, v, out, lse, *state, plan.order, plan.before, starts, *_strides(plain_q, plain_k, v, out),
            *common, state[0].shape[2], CHUNK=chunk_size(k.shape[2]), **light,
        )  # fmt: skip
    return out, lse, state


def _launch_full(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, common: tuple[int, ...],
    fixed: dict[str, Any],
) -> None:  # fmt: skip
    (B, H, T, D), sizes, schedule, plan = q.shape, call.tiles.full, call.schedule, call.plan
    partial, partial_lse = _partials(schedule, sizes["BM"], q)
    split = {"STARTS": call.starts is not None, "S": schedule.segments}
    bulk = _bulk(k, sizes["BN"]), _bulk(v, sizes["BN"])
    if any(x is None for x in bulk) or not sizes["BULK"]:
        bulk, sizes = (k, v), {**sizes, "BULK": False}
    forward_triton.full_kernel[(call.programs,)](
        q, k, v, *bulk, out, lse, partial, partial_lse, plan.order, plan.before, starts, schedule.table, *_strides(q, k, v, out),
        B, *common, call.scale, call.programs, **split, GROUPS=_groups(schedule), **fixed, **sizes,
    )  # fmt: skip
    if schedule.segments > 1:
        forward_triton.combine_kernel[(triton.cdiv(T, sizes["BM"]), H, B)](
            partial, partial_lse, out, lse, plan.order, plan.before, starts, schedule.table, *_strides(out), B, H, T, common[3],
            call.start, **split, BM=sizes["BM"], D=D, SUM=False,
        )  # fmt: skip


def _bulk(x: Tensor, block: int) -> TensorDescriptor | None:
    """What the tensor copy engine needs to load tiles of `block` tokens; None where the layout does not allow it."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[3]]) if aligned and x.numel() else None


def _groups(schedule: Schedule) -> int:
    return triton.next_power_of_2((schedule.table.numel() - 3) // 2)


def _partials(schedule: Schedule, block: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scratch for the results of split blocks: values and normalisers."""
    slots = schedule.slots if schedule.segments > 1 else 1
    values = torch.empty(slots, block, like.shape[3], device=like.device, dtype=like.dtype)
    return values, torch.empty(slots, block, device=like.device, dtype=torch.float32)


def linear_state(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """State before each chunk of keys: S [B, Hkv, NC, D, D] and z [B, Hkv, NC, D]."""
    B, H, T, D = k.shape
    chunk = chunk_size(T)
    count = triton.cdiv(T, chunk)
    wide = torch.float32 if k.dtype == torch.float32 else torch.bfloat16
    s = torch.empty(B, H, count, D, D, device=k.device, dtype=wide)
    z = torch.empty(B, H, count, D, device=k.device, dtype=torch.float32)
    linear_triton.chunk_kernel[(count, H, B)](
        k, v, s, z, *_strides(k, v), H, T, count, CHUNK=chunk, BN=64 if k.element_size() == 2 else 32, D=D,
        PRECISION=_precision(k), num_warps=4 if D <= 64 else 8,
    )  # fmt: skip
    _prefix(s, z, reverse=False)
    return s, z


def _prefix(s: Tensor, z: Tensor, reverse: bool) -> None:
    B, H, count, D = z.shape
    block = min(64, D)
    grid = (D * D // block + triton.cdiv(D, block), B * H)
    linear_triton.prefix_kernel[grid](
        s, z, count, D=D, CHUNKS=triton.next_power_of_2(count), BLOCK=block, REVERSE=reverse, num_warps=4
    )


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor, out: Tensor, lse: Tensor,
    state: list[Tensor], dout: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (q, k, v, plain_q, plain_k)."""
    B, H, T, D = q.shape
    shared_q, shared_k = plain_q is q or plain_q.data_ptr() == q.data_ptr(), plain_k is k or plain_k.data_ptr() == k.data_ptr()
    plan, blocks, group = call.plan, call.plan.before.shape[2] - 1, H // k.shape[1]
    has_full, has_linear, has_local = (index >= 0 for index in call.native)
    fixed: dict[str, Any] = {"D": D, "PRECISION": _precision(q)}
    block = 64 if q.element_size() == 2 else 32
    light = {**fixed, "BM": block, "BN": block, "num_warps": 4, "num_stages": 2 if q.element_size() == 2 else 1}
    delta = torch.empty_like(lse)
    dq = _empty(q, call.covered and (shared_q or not has_linear))
    rows = (plan.order, plan.before)
    grid = (H, triton.cdiv(T, block), B)
    sizes = (H, group, T, blocks)
    if has_full:
        _launch_full_dq(call, q, k, v, out, dout, lse, delta, dq, fixed)
    if has_local:
        backward_kernels.local_dq_kernel[grid](
            q, k, v, out, dout, lse, delta, dq, *rows, *_strides(q, k, v, out, dout, dq), *sizes, call.window, call.scale, **light
        )
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    softmax = has_full or has_local
    grid = (k.shape[1], triton.cdiv(T, block), B)
    if softmax:
        backward_kernels.dkv_kernel[grid](
            q, k, v, dout, lse, delta, dk, dv, *rows, *_strides(q, k, v, dout, dk, dv), *sizes, call.window, call.scale,
            FULL=has_full, LOCAL=has_local, **light,
        )  # fmt: skip
    else:
        dk.zero_()
    if not has_linear:
        return dq, dk, dv if softmax else dv.zero_(), None, None
    dplain_q = dq if shared_q else torch.zeros_like(plain_q)
    dplain_k = torch.empty_like(plain_k)
    _launch_linear_backward(call, plain_q, plain_k, v, out, dout, lse, delta, state, dplain_q, dplain_k, dv, light, softmax)
    return dq, dk, dv, None if shared_q else dplain_q, dplain_k


def _launch_full_dq(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    fixed: dict[str, Any],
) -> None:  # fmt: skip
    (B, H, T, D), schedule, plan, blocks = q.shape, call.schedule, call.plan, call.plan.before.shape[2] - 1
    sizes = {"BM": call.tiles.full["BM"], "BN": 64 if q.element_size() == 2 else 32, "num_stages": min(call.tiles.full["num_stages"], 2), "num_warps": 8 if q.element_size() == 2 else 4}
    programs = multiprocessors(q.device) * (2 if D <= 64 else 1)
    schedule.table[-1:].zero_()  # the next item to take
    partial, _ = _partials(schedule, sizes["BM"], q)
    backward_kernels.full_dq_kernel[(programs,)](
        q, k, v, out, dout, lse, delta, dq, partial, plan.order, plan.before, schedule.table, *_strides(q, k, v, out, dout, dq),
        B, H, H // k.shape[1], T, blocks, call.scale, programs, S=schedule.segments, GROUPS=_groups(schedule), **fixed, **sizes,
    )  # fmt: skip
    if schedule.segments > 1:
        forward_triton.combine_kernel[(triton.cdiv(T, sizes["BM"]), H, B)](
            partial, partial, dq, lse, plan.order, plan.before, plan.before, schedule.table, *_strides(dq), B, H, T, blocks, 0,
            STARTS=False, S=schedule.segments, BM=sizes["BM"], D=D, SUM=True,
        )  # fmt: skip


def _launch_linear_backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, state: list[Tensor],
    dq: Tensor, dk: Tensor, dv: Tensor, light: dict[str, Any], add: bool,
) -> None:  # fmt: skip
    (B, H, T, D), plan, group = q.shape, call.plan, q.shape[1] // k.shape[1]
    blocks, count, chunk = plan.before.shape[2] - 1, state[0].shape[2], chunk_size(T)
    rows, sizes, Hkv = (plan.order, plan.before), (H, group, T, blocks, count), k.shape[1]
    backward_kernels.linear_dq_kernel[(H, triton.cdiv(T, light["BM"]), B)](
        q, k, v, out, dout, lse, delta, dq, *state, *rows, *_strides(q, k, v, out, dout, dq), *sizes, CHUNK=chunk, **light
    )
    r, rz = torch.empty_like(state[0]), torch.empty_like(state[1])
    only = {key: value for key, value in light.items() if key != "BN"}
    backward_kernels.chunk_reverse_kernel[(count, Hkv, B)](
        q, dout, lse, delta, r, rz, *rows, *_strides(q, dout), *sizes, CHUNK=chunk, **only
    )
    _prefix(r, rz, reverse=True)
    backward_kernels.linear_dkv_kernel[(Hkv, triton.cdiv(T, light["BN"]), B)](
        q, k, v, dout, lse, delta, dk, dv, r, rz, *rows, *_strides(q, k, v, dout, dk, dv), *sizes, CHUNK=chunk, ADD=add, **light
    )
