"""Launches of local attention over all rows."""

from typing import Any

import torch
import triton
from torch import Tensor

from bayes_router.attention.kernels.triton import backward, forward
from bayes_router.attention.kernels.triton.call import Tiles, precision, strides, tiles
from bayes_router.attention.kernels.triton.launch import launch


def local_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int, sinks: int, scale: float
) -> None:
    """Writes out [B, H, T, D] and lse [B, H, T]; scale is 1 / sqrt(Dh) in base 2."""
    (B, H, T, _), (sizes, fixed) = q.shape, _sizes(q)
    launch(
        forward.local_kernel, (H, triton.cdiv(T, sizes.local["BM"]), B),
        q, k, v, out, lse, lse, lse, lse, *strides(q, k, v, out), H, H // k.shape[1], H, T, 0, T,
        0, window, scale,
        SINKS=sinks, STARTS=False, **fixed, **sizes.local,
    )  # fmt: skip


def local_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dq: Tensor,
    dk: Tensor, dv: Tensor, window: int,
    sinks: int, scale: float,
) -> None:  # fmt: skip
    """Writes the gradients of q, k and v."""
    (B, H, T, _), (sizes, fixed) = q.shape, _sizes(q)
    delta, common = torch.empty_like(lse), (H, H // k.shape[1], H, T, 0, window, scale)
    launch(
        backward.local_dq_kernel, (H, triton.cdiv(T, sizes.local_dq["BM"]), B),
        q, k, v, out, dout, lse, delta, dq, lse, lse, *strides(q, k, v, out, dout, dq), *common,
        SINKS=sinks,
        **fixed, **sizes.local_dq,
    )  # fmt: skip
    launch(
        backward.dkv_kernel, (k.shape[1], triton.cdiv(T, sizes.dkv["BN"]), B),
        q, k, v, dout, lse, delta, dk, dv, lse, lse, *strides(q, k, v, dout, dk, dv), *common,
        SINKS=sinks, FULL=False,
        LOCAL=True, **fixed, **sizes.dkv,
    )  # fmt: skip


def _sizes(q: Tensor) -> tuple[Tiles, dict[str, Any]]:
    return tiles(q.shape[3], q.dtype), {"D": q.shape[3], "PRECISION": precision(q), "SORTED": False}
