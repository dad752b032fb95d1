"""What the backend `short` launches for the shortest texts: a kernel or two, and one backward.

Nothing is sorted; see `kernels.triton.mixed`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_router.attention.experts.contract import Kernel
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels.capability import LOG2_E, ceil_div, packed, padded
from bayes_router.attention.kernels.triton.call import Sizes, output, precision, strides
from bayes_router.attention.kernels.triton.launch import launch
from bayes_router.attention.kernels.triton.mixed import (
    mixed_backward_kernel,
    mixed_join_kernel,
    mixed_kernel,
)

ROWS = 32  # queries whose segments a program joins


class Blocks(NamedTuple):
    """Tiles of the two kernels, BM queries and BN keys; KM, KN: where keys get their gradients."""

    forward: Sizes
    backward: Sizes


def blocks(head_dim: int, dtype: torch.dtype) -> Blocks:
    """What measured fastest on an H100."""
    if dtype == torch.float32:  # its products are not tensor-core ones: small tiles
        tile = {"BM": 32, "BN": 32, "num_warps": 4 if head_dim <= 32 else 8, "num_stages": 1}
        return Blocks(tile, {**tile, "KM": 32, "KN": 32})
    small = {"BM": 64, "BN": 32, "KM": 32, "num_stages": 2}
    if head_dim > 64:
        pair = {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2}
        return Blocks(pair, {**small, "KN": 32, "num_warps": 8})
    # fewer registers, more resident programs
    deep = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
    return Blocks(deep, {**small, "KN": 64, "num_warps": 4})


def segment(num_keys: int) -> int:
    """Keys that a program takes, at most: short enough to keep the device busy."""
    return 128 if num_keys <= 512 else 512


class _Facts(NamedTuple):
    """What every launch of one pass takes, beside the tensors."""

    route: Tensor
    lengths: Tensor | None
    starts: Tensor | None
    indices: tuple[int, int, int]  # of full, linear and local among the experts; -1: absent
    experts: int
    window: int
    sinks: int
    scale: float
    keep: bool


def launch_mixed(problem: RoutedProblem) -> Tensor:
    """[B, H, Tq, Dh] of a checked problem on CUDA: built-in experts, each at most once."""
    head_dim = problem.q.shape[3]
    kernels = {expert.kernel: index for index, expert in problem.computed()}
    kinds = (Kernel.FULL, Kernel.LINEAR, Kernel.LOCAL)
    full, linear, local = (kernels.get(kind, -1) for kind in kinds)
    window, sinks = problem.experts[local].shape[2:] if local >= 0 else (1, 0)
    facts = _Facts(
        problem.route, problem.lengths, problem.starts, (full, linear, local),
        len(problem.experts), window, sinks, LOG2_E / head_dim**0.5, problem.needs_grad,
    )  # fmt: skip
    q, k, v = (packed(padded(x)) for x in (problem.q, problem.k, problem.v))
    # features of heads that are padded are not those of zeros
    one_pair = problem.plain_q is problem.q and problem.plain_k is problem.k
    same = linear < 0 or (one_pair and q is problem.q)
    # phi(-inf) = 0
    plain_q, plain_k = (
        (q, k)
        if same
        else (packed(padded(x, -torch.inf)) for x in (problem.plain_q, problem.plain_k))
    )
    # kernels run on the current device, whatever their tensors are on
    with torch.cuda.device_of(q):
        if facts.keep:
            out: Tensor = _Mixed.apply(facts, same, q, k, v, plain_q, plain_k)
        else:
            out = _forward(facts, same, q, k, v, plain_q, plain_k)[0]
    return out[..., :head_dim]


def _forward(facts: _Facts, same: bool, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    q, k = inputs[:2]
    (B, H, T, D), num_keys, route = q.shape, k.shape[2], facts.route
    out = output(q, covered=True)
    lse = torch.empty(B, H, T if facts.keep else 0, device=q.device, dtype=torch.float32)
    sizes = blocks(D, q.dtype).forward
    if not out.numel():
        return out, lse
    BM, part = sizes["BM"], segment(num_keys)
    split = ceil_div(num_keys, part)
    count = ceil_div(T, BM)
    slots = B * H * count * split if split > 1 else 0
    partial = torch.empty(slots, BM, D, device=q.device, dtype=q.dtype)
    norms = torch.empty(slots, 2, BM, device=q.device, dtype=torch.float32)
    written = (out, lse, partial, norms, route, route if facts.lengths is None else facts.lengths,
               route if facts.starts is None else facts.starts)  # fmt: skip
    flags = {"PADDED": facts.lengths is not None, "STARTS": facts.starts is not None}
    unit, start = H // route.shape[2], num_keys - T
    launch(
        mixed_kernel, (H, count * split, B),
        *inputs, *written, *strides(*inputs, out), *route.stride(), *facts.indices, facts.experts,
        H, H // k.shape[1], unit, T, num_keys, start, facts.window, facts.scale, part, split,
        **flags, SINKS=facts.sinks, SAME=same, KEEP=facts.keep, **_fixed(q), **sizes,
        sanitize_overflow=False,
    )  # fmt: skip
    if split > 1:
        launch(
            mixed_join_kernel, (H, ceil_div(T, ROWS), B),
            *written, *strides(out), *route.stride(), *facts.indices, H, unit, T, start, part,
            split, **flags, KEEP=facts.keep, ROWS=ROWS, BM=BM, D=D, num_warps=4,
        )  # fmt: skip
    return out, lse


def _backward(
    facts: _Facts, same: bool, inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, plain_q, plain_k = inputs
    (B, H, T, D), HK, route = q.shape, k.shape[1], facts.route
    found = [torch.empty_like(x) for x in inputs[: 3 if same else 5]]
    dq, dk, dv, dplain_q, dplain_k = found if not same else (*found, found[0], found[1])
    tiles, lengths = blocks(D, q.dtype).backward, route if facts.lengths is None else facts.lengths
    if out.numel():
        programs = HK * ceil_div(T, tiles["KN"]) + H * ceil_div(T, tiles["BM"])
        launch(
            mixed_backward_kernel, (programs, B),
            *inputs, out, dout, lse, dq, dplain_q, dk, dplain_k, dv, route, lengths,
            *strides(*inputs, out, dout, dq, dplain_q, dk, dplain_k, dv), *route.stride(),
            *facts.indices, H, H // HK, H // route.shape[2], T, facts.window, facts.scale,
            PADDED=facts.lengths is not None, SINKS=facts.sinks, SAME=same, **_fixed(q), **tiles,
        )  # fmt: skip
    return (dq, dk, dv, None, None) if same else (dq, dk, dv, dplain_q, dplain_k)


def _fixed(q: Tensor) -> dict[str, Any]:
    return {"D": q.shape[3], "PRECISION": precision(q)}


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, facts: _Facts, same: bool, *inputs: Tensor) -> Tensor:
        out, lse = _forward(facts, same, *inputs)
        ctx.facts, ctx.same = facts, same
        ctx.save_for_backward(*inputs, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        with torch.cuda.device_of(out):
            dout = packed(gradients[0])
            return None, None, *_backward(ctx.facts, ctx.same, tuple(inputs), out, lse, dout)
