"""Launches of local attention over all rows."""

import math
from typing import Any

import torch
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div
from bayes_router.attention.kernels.triton import backward, forward
from bayes_router.attention.kernels.triton.call import Tiles, precision, strides, tiles
from bayes_router.attention.kernels.triton.launch import launch


def local_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int, sinks: int, scale: float
) -> None:
    """Writes out [B, H, T, D] and lse [B, H, T]; scale is 1 / sqrt(Dh) in base 2."""
    (B, H, T, _), (sizes, fixed) = q.shape, _sizes(q)
    launch(
        forward.local_kernel, (H, ceil_div(T, sizes.local["BM"]), B),
        q, k, v, out, lse, lse, lse, lse, *strides(q, k, v, out), H, H // k.shape[1], H, T, 0, T,
        0, window, scale,
        SINKS=sinks, STARTS=False, **fixed, **sizes.local,
    )  # fmt: skip


def local_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dq: Tensor,
    dk: Tensor, dv: Tensor, window: int,
    sinks: int, scale: float,
) -> None:  # fmt: skip
    """Writes the gradients of q, k and v.

    Sinks get those of queries whose window they have left from `_of_sinks`: one block of keys that
    every later query sees would keep one program busy long after all others.
    """
    (B, H, T, _), (sizes, fixed) = q.shape, _sizes(q)
    delta, common = torch.empty_like(lse), (H, H // k.shape[1], H, T, 0, window, scale)
    launch(
        backward.local_dq_kernel, (H, ceil_div(T, sizes.local_dq["BM"]), B),
        q, k, v, out, dout, lse, lse, delta, dq, lse, lse,
        *strides(q, k, v, out, dout, dq), *common, SINKS=sinks,
        **fixed, **sizes.local_dq,
    )  # fmt: skip
    launch(
        backward.dkv_kernel, (k.shape[1], ceil_div(T, sizes.dkv["BN"]), B),
        q, k, v, dout, lse, delta, dk, dv, lse, lse, lse, *strides(q, k, v, dout, dk, dv), *common,
        SINKS=0, FULL=False,
        LOCAL=True, ADD_K=False, ADD_V=False, **fixed, **sizes.dkv,
    )  # fmt: skip
    if sinks and window < T:
        _of_sinks(q, k, v, dout, lse, delta, dk, dv, window, sinks, scale)


def _of_sinks(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor,
    dv: Tensor, window: int, sinks: int, scale: float,
) -> None:  # fmt: skip
    """Adds to the gradients of the first keys what queries give them from `window` tokens on."""
    groups = (k.shape[1], -1)
    q, dout, lse, delta = (x[:, :, window:].unflatten(1, groups) for x in (q, dout, lse, delta))
    first_k, first_v = (x[:, :, None, :sinks] for x in (k, v))  # [B, Hkv, 1, sinks, D]
    s, dp = (q @ first_k.mT).float() * scale, (dout @ first_v.mT).float()  # [B, Hkv, G, T', sinks]
    t, n = (torch.arange(size, device=q.device) for size in (q.shape[3], s.shape[4]))
    p = torch.exp2(s - lse[..., None]).masked_fill(t[:, None] < n, 0.0)
    ds = p * (dp - delta[..., None])
    dv[:, :, :sinks] += (p.to(dout.dtype).mT @ dout).float().sum(2).to(dv)
    dk[:, :, :sinks] += ((ds.to(q.dtype).mT @ q).float().sum(2) * (scale * math.log(2))).to(dk)


def _sizes(q: Tensor) -> tuple[Tiles, dict[str, Any]]:
    return tiles(q.shape[3], q.dtype), {"D": q.shape[3], "PRECISION": precision(q), "SORTED": False}
