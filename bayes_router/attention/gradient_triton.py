"""The routed backward pass: launches the kernels of `backward_triton`."""

from typing import Any

import torch
import triton
from torch import Tensor

from bayes_router.attention import backward_triton as kernels
from bayes_router.attention.call_triton import (
    Call,
    chunk_size,
    combine,
    empty,
    multiprocessors,
    partials,
    precision,
    prefix,
    strides,
)
from bayes_router.attention.launch_triton import launch


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor, out: Tensor, lse: Tensor,
    state: list[Tensor], dout: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (q, k, v, plain_q, plain_k)."""
    B, H, T, D = q.shape
    shared_q = plain_q.data_ptr() == q.data_ptr()
    plan, blocks, group = call.plan, call.plan.before.shape[2] - 1, H // k.shape[1]
    has_full, has_linear, has_local = (index >= 0 for index in call.native)
    fixed: dict[str, Any] = {"D": D, "PRECISION": precision(q)}
    delta = torch.empty_like(lse)
    dq = empty(q, call.covered and (shared_q or not has_linear))
    rows = (plan.order, plan.before)
    sizes = (H, group, T, blocks)
    if has_full:
        _launch_full_dq(call, q, k, v, out, dout, lse, delta, dq, fixed)
    if has_local:
        launch(
            kernels.local_dq_kernel, (H, triton.cdiv(T, call.tiles.local_dq["BM"]), B),
            q, k, v, out, dout, lse, delta, dq, *rows, *strides(q, k, v, out, dout, dq), *sizes, call.window, call.scale,
            **fixed, **call.tiles.local_dq,
        )  # fmt: skip
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    softmax = has_full or has_local
    if softmax:
        launch(
            kernels.dkv_kernel, (k.shape[1], triton.cdiv(T, call.tiles.dkv["BN"]), B),
            q, k, v, dout, lse, delta, dk, dv, *rows, *strides(q, k, v, dout, dk, dv), *sizes, call.window, call.scale,
            FULL=has_full, LOCAL=has_local, **fixed, **call.tiles.dkv,
        )  # fmt: skip
    else:
        dk.zero_()
    if not has_linear:
        return dq, dk, dv if softmax else dv.zero_(), None, None
    dplain_q = dq if shared_q else torch.zeros_like(plain_q)
    dplain_k = torch.empty_like(plain_k)
    _launch_linear_backward(call, plain_q, plain_k, v, out, dout, lse, delta, state, dplain_q, dplain_k, dv, fixed, softmax)
    return dq, dk, dv, None if shared_q else dplain_q, dplain_k


def _launch_full_dq(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    fixed: dict[str, Any],
) -> None:  # fmt: skip
    (_, H, T, _), schedule, plan, blocks = q.shape, call.schedule, call.plan, call.plan.before.shape[2] - 1
    sizes = {**call.tiles.full_dq, "BM": call.tiles.full["BM"]}
    programs = multiprocessors(q.device) * call.tiles.per_sm_dq
    schedule.counters[1:].zero_()  # the next item to take
    partial, _ = partials(schedule, sizes["BM"], q)
    launch(
        kernels.full_dq_kernel, (programs,),
        q, k, v, out, dout, lse, delta, dq, partial, plan.order, plan.before, schedule.items, schedule.counters,
        *strides(q, k, v, out, dout, dq), H, H // k.shape[1], T, blocks, call.scale, programs, **fixed, **sizes,
    )  # fmt: skip
    combine(call, partial, partial, dq, lse, sizes["BM"], add=True)


def _launch_linear_backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, state: list[Tensor],
    dq: Tensor, dk: Tensor, dv: Tensor, fixed: dict[str, Any], add: bool,
) -> None:  # fmt: skip
    (B, H, T, _), plan, group = q.shape, call.plan, q.shape[1] // k.shape[1]
    blocks, count, chunk = plan.before.shape[2] - 1, state[0].shape[2], chunk_size(T)
    rows, sizes, Hkv = (plan.order, plan.before), (H, group, T, blocks, count), k.shape[1]
    read, pair = {**fixed, **call.tiles.linear_dq, "CHUNK": chunk}, {**fixed, **call.tiles.linear_dkv, "CHUNK": chunk}
    launch(
        kernels.linear_dq_kernel,
        (H, triton.cdiv(T, read["BM"]), B),
        q,
        k,
        v,
        out,
        dout,
        lse,
        delta,
        dq,
        *state,
        *rows,
        *strides(q, k, v, out, dout, dq),
        *sizes,
        **read,
    )
    r, rz = torch.empty_like(state[0]), torch.empty_like(state[1])
    only = {key: value for key, value in pair.items() if key != "BN"}
    launch(kernels.chunk_reverse_kernel, (count, Hkv, B), q, dout, lse, delta, r, rz, *rows, *strides(q, dout), *sizes, **only)
    prefix(r, rz, reverse=True)
    launch(
        kernels.linear_dkv_kernel,
        (Hkv, triton.cdiv(T, pair["BN"]), B),
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        r,
        rz,
        *rows,
        *strides(q, k, v, dout, dk, dv),
        *sizes,
        ADD=add,
        **pair,
    )
