"""What the backend `short` launches for the shortest texts: one kernel, and two backward.

Nothing is sorted; see `kernels.triton.mixed`.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_router.attention.experts.contract import Kernel
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels.capability import LOG2_E, packed, padded
from bayes_router.attention.kernels.triton.call import Sizes, output, precision, strides
from bayes_router.attention.kernels.triton.launch import launch
from bayes_router.attention.kernels.triton.mixed import (
    mixed_dkv_kernel,
    mixed_dq_kernel,
    mixed_kernel,
)


class Blocks(NamedTuple):
    """Tiles of the three kernels."""

    forward: Sizes
    dq: Sizes
    dkv: Sizes


def blocks(head_dim: int, dtype: torch.dtype) -> Blocks:
    """What measured fastest on an H100."""
    if dtype == torch.float32:  # its products are not tensor-core ones: small tiles
        tile = {"BM": 32, "BN": 32, "num_warps": 4 if head_dim <= 32 else 8, "num_stages": 1}
        return Blocks(tile, tile, tile)
    if head_dim > 64:
        pair = {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2}
        return Blocks(pair, pair, {**pair, "BM": 32})
    deep = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
    return Blocks(deep, {**deep, "BN": 32, "num_stages": 2}, {**deep, "BM": 32, "BN": 32})


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
    same = problem.plain_q is problem.q and problem.plain_k is problem.k and q is problem.q
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
    (B, H, T, D), route = q.shape, facts.route
    out = output(q, covered=True)
    lse = torch.empty(B, H, T if facts.keep else 0, device=q.device, dtype=torch.float32)
    sizes = blocks(D, q.dtype).forward
    if not out.numel():
        return out, lse
    launch(
        mixed_kernel, (H, triton.cdiv(T, sizes["BM"]), B),
        *inputs, out, lse, route, route if facts.lengths is None else facts.lengths,
        route if facts.starts is None else facts.starts, *strides(*inputs, out), *route.stride(),
        *facts.indices, facts.experts, H, H // k.shape[1], H // route.shape[2], T, k.shape[2],
        k.shape[2] - T, facts.window, facts.scale, PADDED=facts.lengths is not None,
        STARTS=facts.starts is not None, SINKS=facts.sinks, SAME=same, KEEP=facts.keep,
        **_fixed(q), **sizes, sanitize_overflow=False,
    )  # fmt: skip
    return out, lse


def _backward(
    facts: _Facts, same: bool, inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, plain_q, plain_k = inputs
    (B, H, T, D), HK, route = q.shape, k.shape[1], facts.route
    delta, found = torch.empty_like(lse), [torch.empty_like(x) for x in inputs[: 3 if same else 5]]
    dq, dk, dv, dplain_q, dplain_k = found if not same else (*found, found[0], found[1])
    tiles, lengths = blocks(D, q.dtype), route if facts.lengths is None else facts.lengths
    fixed: dict[str, Any] = {
        "PADDED": facts.lengths is not None, "SINKS": facts.sinks, "SAME": same, **_fixed(q)
    }  # fmt: skip
    numbers = (*facts.indices, H, H // HK, H // route.shape[2], T, facts.window, facts.scale)
    if out.numel():
        launch(
            mixed_dq_kernel, (H, triton.cdiv(T, tiles.dq["BM"]), B),
            *inputs, out, dout, lse, delta, dq, dplain_q, route, lengths,
            *strides(*inputs, out, dout, dq, dplain_q), *route.stride(), *numbers, **fixed,
            **tiles.dq,
        )  # fmt: skip
        launch(
            mixed_dkv_kernel, (HK, triton.cdiv(T, tiles.dkv["BN"]), B),
            *inputs, dout, lse, delta, dk, dplain_k, dv, route, lengths,
            *strides(*inputs, dout, dk, dplain_k, dv), *route.stride(), *numbers, **fixed,
            **tiles.dkv,
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
