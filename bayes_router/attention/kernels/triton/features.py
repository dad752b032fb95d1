# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of what gated linear attention makes of queries and keys.

One read of each, one write.

    phi(x) = softmax(s_h x),  s_h = exp(log_scale_h)            log_gate = logsigmoid(w_h . k + b_h)

in float32 whatever the inputs are, for every query head; columns past the head size are zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div, head_size
from bayes_router.attention.kernels.triton.call import strides
from bayes_router.attention.kernels.triton.launch import follow, launch


def _rows(dim: int) -> int:
    """Tokens of a block."""
    return 64 if head_size(dim) <= 64 else 32


@triton.jit
def softmax_rows(x, scale, real):
    """softmax(scale x) over the real columns, zero elsewhere."""
    y = tl.where(real[None, :], x * scale, -float("inf"))
    y = tl.exp(y - tl.max(y, 1)[:, None])
    return y / tl.sum(y, 1)[:, None]


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log(1 + u), u = exp(-|x|).

    log(1 + u) = 2 artanh(z), z = u / (2 + u) <= 1/3, exact where u is small.
    """
    u = tl.exp(-tl.abs(x))
    z = u / (2.0 + u)
    z2 = z * z
    series = 1.0 + z2 * (
        1 / 3 + z2 * (1 / 5 + z2 * (1 / 7 + z2 * (1 / 9 + z2 * (1 / 11 + z2 * (1 / 13 + z2 / 15)))))
    )
    return tl.minimum(x, 0.0) - 2.0 * z * series


@triton.jit
def feature_kernel(
    X, Phi, LogGate, Gate, Bias, LogScale, x_b, x_h, x_t, H, GROUP, T,
    GATED: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Features of a block of tokens for one query head; GATED: of keys, and their log gates."""
    follow()
    i, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t, d = i * BM + tl.arange(0, BM), tl.arange(0, D)
    inside, real = t < T, d < DIM
    at = X + b * x_b + h // GROUP * x_h + t[:, None].to(tl.int64) * x_t + d[None, :]
    x = tl.load(at, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
    y = softmax_rows(x, tl.exp(tl.load(LogScale + h).to(tl.float32)), real)
    row = (b * H + h) * T + t
    tl.store(Phi + row[:, None] * D + d[None, :], y.to(Phi.dtype.element_ty), mask=inside[:, None])
    if GATED:
        gate = tl.load(Gate + h * DIM + d, mask=real, other=0.0).to(tl.float32)
        logit = tl.sum(x * gate[None, :], 1) + tl.load(Bias + h).to(tl.float32)
        tl.store(LogGate + row, log_sigmoid(logit), mask=inside)


@triton.jit
def feature_backward_kernel(
    X, DPhi, DLogGate, DX, Sums, Gate, Bias, LogScale, x_b, x_h, x_t, g_b, g_h, g_t, d_b, d_h, d_t,
    H, GROUP, T,
    GATED: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of tokens of one head of X, over its query heads.

    And its part of those of the parameters.

    Sums [B blocks, H, W]: gate and bias (GATED), then the log of the scale; W = DIM + 2 or 1.
    """
    follow()
    i, hk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t, d = i * BM + tl.arange(0, BM), tl.arange(0, D)
    inside, real = t < T, d < DIM
    both = inside[:, None] & real[None, :]
    at = X + b * x_b + hk * x_h + t[:, None].to(tl.int64) * x_t + d[None, :]
    x = tl.load(at, mask=both, other=0.0).to(tl.float32)
    dx = tl.zeros([BM, D], tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        scale = tl.exp(tl.load(LogScale + h).to(tl.float32))
        y = softmax_rows(x, scale, real)
        from_h = DPhi + b * g_b + h * g_h + t[:, None].to(tl.int64) * g_t + d[None, :]
        dphi = tl.load(from_h, mask=both, other=0.0).to(tl.float32)
        dy = y * (dphi - tl.sum(y * dphi, 1)[:, None]) * scale
        dx += dy
        part = Sums + ((b * tl.num_programs(0) + i) * H + h) * (DIM + 2 if GATED else 1)
        if GATED:
            gate = tl.load(Gate + h * DIM + d, mask=real, other=0.0).to(tl.float32)
            logit = tl.sum(x * gate[None, :], 1) + tl.load(Bias + h).to(tl.float32)
            dlogit = tl.load(DLogGate + (b * H + h) * T + t, mask=inside, other=0.0) / (
                1.0 + tl.exp(logit)
            )
            dx += dlogit[:, None] * gate[None, :]
            tl.store(part + d, tl.sum(dlogit[:, None] * x, 0), mask=real)
            tl.store(part + DIM, tl.sum(dlogit, 0))
            part += DIM + 1
        tl.store(part, tl.sum(tl.sum(dy * x, 1), 0))
    at = DX + b * d_b + hk * d_h + t[:, None].to(tl.int64) * d_t + d[None, :]
    tl.store(at, dx.to(DX.dtype.element_ty), mask=both)


def features_forward(
    q: Tensor,
    k: Tensor,
    gate: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    log_gate: Tensor,
) -> None:
    """Writes phi(q) and phi(k) [B, H, T, D], contiguous, and the log gates [B, H, T]."""
    H, rows = q.shape[1], _rows(q.shape[3])
    for x, phi in ((q, phi_q), (k, phi_k)):
        launch(
            feature_kernel, (ceil_div(x.shape[2], rows), H, x.shape[0]),
            x, phi, log_gate, gate, bias, log_scale, *strides(x), H, H // x.shape[1], x.shape[2],
            GATED=x is k, DIM=x.shape[3], BM=rows, D=head_size(x.shape[3]), num_warps=4,
        )  # fmt: skip


def features_backward(
    q: Tensor, k: Tensor, gate: Tensor, bias: Tensor, log_scale: Tensor, dphi_q: Tensor,
    dphi_k: Tensor, dlog_gate: Tensor,
    dq: Tensor, dk: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Writes the gradients of q and k; returns those of gate, bias and log_scale in float32."""
    H, rows, found = q.shape[1], _rows(q.shape[3]), []
    for x, dphi, dx in ((q, dphi_q, dq), (k, dphi_k, dk)):
        (B, heads, T, dim), blocks = x.shape, ceil_div(x.shape[2], rows)
        sums = torch.empty(
            B * blocks, H, dim + 2 if x is k else 1, device=x.device, dtype=torch.float32
        )
        launch(
            feature_backward_kernel, (blocks, heads, B),
            x, dphi, dlog_gate, dx, sums, gate, bias, log_scale, *strides(x, dphi, dx), H,
            H // heads, T,
            GATED=x is k, DIM=dim, BM=rows, D=head_size(dim), num_warps=4,
        )  # fmt: skip
        found.append(sums.sum(0))
    of_q, of_k = found
    return of_k[:, :-2].contiguous(), of_k[:, -2].clone(), of_k[:, -1] + of_q[:, -1]
