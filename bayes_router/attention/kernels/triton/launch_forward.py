"""Launches the kernels of the routed forward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div
from bayes_router.attention.kernels.triton import forward as kernels
from bayes_router.attention.kernels.triton.call import (
    Call,
    Tiles,
    chunk_size,
    combine,
    fills,
    output,
    partials,
    precision,
    strides,
)
from bayes_router.attention.kernels.triton.launch import Beside, launch
from bayes_router.attention.kernels.triton.launch_linear import (
    decays,
    empty_states,
    linear_reads,
    linear_states,
)


class Begun(NamedTuple):
    """A forward pass whose tokens are not sorted yet.

    Attributes:
        beside: the stream of all but full attention.
        decay: the sums of the log gates, if there are any.
        state: the linear state before each chunk; empty where no expert is linear.
    """

    beside: Beside
    decay: Tensor | None
    state: tuple[Tensor, ...]


def begin(
    native: tuple[int, int, int], tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, plain_k: Tensor,
    log_gate: Tensor | None,
) -> Begun:  # fmt: skip
    """Launch what depends on no route: the linear states."""
    full, linear, local = (index >= 0 for index in native)
    beside = Beside(q.device, full and (linear or local) and fills(q))
    if not linear:
        return Begun(beside, None, ())
    decay, state = decays(log_gate), empty_states(plain_k, chunk_size(k.shape[2]))
    beside.run(lambda: linear_states(plain_k, v, decay, tiles, state))
    return Begun(beside, decay, state)


def forward(
    call: Call, begun: Begun, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse [B, H, Tq]), which stand when `begun.beside` has been joined."""
    B, H, T, D = q.shape
    out = output(q, call.covered)
    lse = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
    plan, rows = call.plan, call.rows
    starts = plan.before if call.starts is None else call.starts
    fixed: dict[str, Any] = {"D": D, "PRECISION": precision(q)}
    common = (H, H // k.shape[1], H // call.units, T, rows.steps, k.shape[2], call.start)
    has_full, has_linear, has_local = (index >= 0 for index in call.native)

    def launch_others() -> None:
        if has_linear:
            linear_reads(
                plain_q, plain_k, v, begun.decay, out, lse, rows, call.tiles, begun.state,
                call.starts, call.start,
            )  # fmt: skip
        if has_local:
            launch(
                kernels.local_kernel, (H, ceil_div(T, call.tiles.local["BM"]), B),
                q, k, v, out, lse, plan.order, plan.before, starts, *strides(q, k, v, out),
                *common, call.window, call.scale, SINKS=call.sinks, SORTED=True,
                STARTS=call.starts is not None, **fixed, **call.tiles.local,
            )  # fmt: skip

    begun.beside.run(launch_others)
    if has_full:
        _launch_full(call, q, k, v, out, lse, starts, common, fixed)
    return out, lse


def _launch_full(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
    common: tuple[int, ...],
    fixed: dict[str, Any],
) -> None:  # fmt: skip
    sizes, work, plan = call.tiles.full, call.work, call.plan
    partial, partial_lse = partials(call, sizes["BM"], q)
    has_starts = call.starts is not None
    if call.tiles.hopper:
        _launch_hopper(call, q, k, v, out, lse, partial, partial_lse, starts, common)
    else:
        launch(
            kernels.full_kernel, (call.programs,),
            q, k, v, out, lse, partial, partial_lse, plan.order, plan.before, starts, work.items,
            work.counters, *strides(q, k, v, out), *common, call.scale, call.programs,
            STARTS=has_starts, **fixed, **sizes,
        )  # fmt: skip
    combine(call, partial, partial_lse, out, lse, sizes["BM"], add=False)


def _launch_hopper(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, partial: Tensor,
    partial_lse: Tensor, starts: Tensor, common: tuple[int, ...],
) -> None:  # fmt: skip
    # Gluon is looked for only where it runs
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from bayes_router.attention.kernels.triton.hopper import full_kernel

    sizes, work, plan = call.tiles.full, call.work, call.plan
    tile, layout = [1, 1, sizes["BN"], q.shape[3]], NVMMASharedLayout(128, 16, rank=4)
    k, v = (TensorDescriptor(x, list(x.shape), list(x.stride()), tile, layout) for x in (k, v))
    H, group, unit, T, steps, _, start = common
    launch(
        full_kernel, (call.programs,),
        q, k, v, out, lse, partial, partial_lse, plan.order, plan.before, starts, work.items,
        work.counters, *strides(q, out), H, group, unit, T, steps, start, call.scale,
        call.programs, STARTS=call.starts is not None, D=q.shape[3], **sizes,
    )  # fmt: skip
