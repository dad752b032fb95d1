"""The routed backward pass: launches the kernels of `backward`."""

from typing import Any

import torch
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div
from bayes_router.attention.kernels.triton import backward as kernels
from bayes_router.attention.kernels.triton.call import (
    Call,
    combine,
    empty,
    multiprocessors,
    partials,
    precision,
    strides,
)
from bayes_router.attention.kernels.triton.launch import launch
from bayes_router.attention.kernels.triton.launch_linear import linear_backward


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor, out: Tensor,
    lse: Tensor,
    decay: Tensor | None, state: list[Tensor], dout: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (q, k, v, plain_q, plain_k, log_gate).

    Where queries or keys of both kinds are one tensor, theirs is the sum, and None the other.
    """
    B, H, T, D = q.shape
    shared_q, shared_k = (x.data_ptr() == y.data_ptr() for x, y in ((plain_q, q), (plain_k, k)))
    rows, group = call.rows, H // k.shape[1]
    has_full, has_linear, has_local = (index >= 0 for index in call.native)
    fixed: dict[str, Any] = {"D": D, "PRECISION": precision(q)}
    by_place = torch.empty_like(lse), torch.empty_like(lse)  # `SortedLse`, `SortedDelta`
    dq = empty(q, call.covered and (shared_q or not has_linear))
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dplain_q = torch.zeros_like(plain_q) if has_linear and not shared_q else None
    dplain_k = torch.empty_like(plain_k) if has_linear and not shared_k else None
    dlog_gate = None if decay is None else torch.zeros_like(lse)
    sizes = (H, group, H // call.units, T, rows.steps)

    if has_linear:
        into_q, into_k = dq if dplain_q is None else dplain_q, dk if dplain_k is None else dplain_k
        linear_backward(
            plain_q, plain_k, v, decay, out, dout, lse, torch.empty_like(lse), state, into_q,
            into_k, dv, dlog_gate, rows, call.tiles,
        )  # fmt: skip
    if has_full:
        _launch_full_dq(call, q, k, v, out, dout, lse, by_place, dq, fixed)
    if has_local:
        launch(
            kernels.local_dq_kernel, (H, ceil_div(T, call.tiles.local_dq["BM"]), B),
            q, k, v, out, dout, lse, *by_place, dq, rows.order, rows.before,
            *strides(q, k, v, out, dout, dq), *sizes, call.window,
            call.scale, SINKS=call.sinks, SORTED=True, **fixed, **call.tiles.local_dq,
        )  # fmt: skip
    if has_full or has_local:
        launch(
            kernels.dkv_kernel, (k.shape[1], ceil_div(T, call.tiles.dkv["BN"]), B),
            q, k, v, dout, *by_place, dk, dv, rows.order, rows.before, call.work.counters,
            *strides(q, k, v, dout, dk, dv), *sizes, call.window,
            call.scale, SINKS=call.sinks, FULL=has_full, LOCAL=has_local, SORTED=True,
            ADD_K=has_linear and shared_k, ADD_V=has_linear, **fixed, **call.tiles.dkv,
        )  # fmt: skip
    elif not (has_linear and shared_k):
        dk.zero_()
    if not (has_full or has_linear or has_local):
        dv.zero_()
    return dq, dk, dv, dplain_q, dplain_k, dlog_gate


def _launch_full_dq(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
    by_place: tuple[Tensor, Tensor], dq: Tensor,
    fixed: dict[str, Any],
) -> None:  # fmt: skip
    (_, H, T, _), work, plan, blocks = q.shape, call.work, call.plan, call.plan.before.shape[2] - 1
    sizes = {**call.tiles.full_dq, "BM": call.tiles.full["BM"]}
    programs = multiprocessors(q.device) * call.tiles.per_sm_dq
    partial, _ = partials(call, sizes["BM"], q)
    launch(
        kernels.full_dq_kernel, (programs,),
        q, k, v, out, dout, lse, *by_place, dq, partial, plan.order, plan.before, work.items,
        work.counters,
        *strides(q, k, v, out, dout, dq), H, H // k.shape[1], H // call.units, T, blocks,
        call.scale, programs, **fixed,
        **sizes,
    )  # fmt: skip
    combine(call, partial, partial, dq, lse, sizes["BM"], add=True)
