# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""One launch from the hidden states of a layer to its posterior and its choices, for all routing
units.

    r = 1 / sqrt(mean(x^2) + eps)        the scale of the root mean square norm
    z = W2 silu(r W1 x + b1) + b2        or r W x + b, where the controller is linear
    concentration = floor + softplus(z)
    choice = argmax_e concentration, or argmax_e log concentration - tilt

x is read once, in its own dtype. Weights are float32: beside bfloat16 or float16 inputs each is the
sum of two halves of that type, whose products with x tensor cores take exactly, so that the result
is float32's. What follows the first product is float32 throughout.
"""

import triton
import triton.language as tl
from torch import Tensor

from bayes_router.attention.kernels.triton.launch import launch

EPSILON = 1.1920928955078125e-07  # of float32, as torch's rms_norm takes it


@triton.jit
def _times(x, w, acc, SPLIT: tl.constexpr):
    """The sum acc + x w^T, w float32; SPLIT: as two products of the type of x."""
    if SPLIT:
        high = w.to(x.dtype)
        low = (w - high.to(tl.float32)).to(x.dtype)
        acc = tl.dot(x, tl.trans(low), acc)
        acc = tl.dot(x, tl.trans(high), acc)
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def route_kernel(
    X, W1, B1, W2, B2, Tilt, Concentration, Choice, N, DIM, x_n, floor, epsilon,
    HIDDEN: tl.constexpr, R: tl.constexpr, E: tl.constexpr, TILTED: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Program: BM tokens.

    RP and EP are R and E up to powers of two, HP the first product's width.
    """
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    real, k0 = n < N, tl.arange(0, BK)
    column = tl.arange(0, RP * EP)
    unit, expert = column // EP, column % EP
    there = (unit < R) & (expert < E)
    row = unit * E + expert  # of W2, B2, Tilt and the concentration
    first = tl.arange(0, HP)  # rows of the first product's weights
    if HIDDEN:
        inside, at = first < HIDDEN, first
    else:
        inside, at = there, row
    acc = tl.zeros([BM, HP], tl.float32)
    square = tl.zeros([BM], tl.float32)
    for k in range(0, DIM, BK):
        cols = k + k0
        x = tl.load(
            X + n[:, None].to(tl.int64) * x_n + cols[None, :],
            mask=real[:, None] & (cols[None, :] < DIM),
            other=0.0,
        )
        w = tl.load(
            W1 + at[:, None] * DIM + cols[None, :],
            mask=inside[:, None] & (cols[None, :] < DIM),
            other=0.0,
        )
        wide = x.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        acc = _times(x, w, acc, SPLIT)
    z = acc * (1.0 / tl.sqrt(square / DIM + epsilon))[:, None]
    if HIDDEN:
        z += tl.load(B1 + at, mask=inside, other=0.0)[None, :]
        z = z / (1.0 + tl.exp(-z))
        w = tl.load(
            W2 + row[:, None] * HIDDEN + first[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        z = tl.dot(z, tl.trans(w), input_precision="ieee")
    z += tl.load(B2 + row, mask=there, other=0.0)[None, :]
    # softplus(z) = max(z, 0) + log(1 + u), by a series of log(1 + u) where u is small
    u = tl.exp(-tl.abs(z))
    small = u * (1.0 - u * (0.5 - u * (1.0 / 3.0 - u * 0.25)))
    concentration = floor + tl.maximum(z, 0.0) + tl.where(u < 0.01, small, tl.log(1.0 + u))
    store = real[:, None] & there[None, :]
    tl.store(
        Concentration + n[:, None].to(tl.int64) * (R * E) + row[None, :], concentration, mask=store
    )
    score = concentration
    if TILTED:
        score = tl.log(concentration) - tl.load(Tilt + row, mask=there, other=0.0)[None, :]
    score = tl.where(there[None, :], score, -float("inf"))
    choice = tl.argmax(tl.reshape(score, [BM, RP, EP]), 2)
    r = tl.arange(0, RP)
    mine = real[:, None] & (r[None, :] < R)
    tl.store(Choice + n[:, None].to(tl.int64) * R + r[None, :], choice.to(tl.int64), mask=mine)


def rows_of(tokens: int, width: int) -> int:
    """Tokens of a program: few where there are few, else what an H100 was fastest with, for
    accumulators of this width: every program reads all weights.
    """
    if tokens < 4096:
        return 16 if tokens <= 64 else 32
    return 128 if tokens >= 16_384 and width <= 64 else 64 if width <= 128 else 32


def launch_route(
    x: Tensor, first: Tensor, first_bias: Tensor | None, out: Tensor, bias: Tensor,
    tilt: Tensor | None, floor: float,
    concentration: Tensor, choice: Tensor,
) -> None:  # fmt: skip
    """Writes concentration [N, R, E] and choice [N, R] of x [N, D], whose last dimension is
    contiguous.

    `first` [hidden, D] with its bias and `out` [R E, hidden]; or, of a linear controller, `first`
    [R E, D] without one, and `out` is not read. Weights are float32 and contiguous; tilt [R E].
    """
    (N, R, E), dim = concentration.shape, x.shape[1]
    hidden = 0 if first_bias is None else len(first)
    experts = triton.next_power_of_2(E)
    units = max(triton.next_power_of_2(R), 16 // experts)
    width = max(16, triton.next_power_of_2(hidden)) if hidden else units * experts
    narrow = x.element_size() == 2
    rows, columns = rows_of(N, width) if narrow else 32, 64 if narrow else 32
    launch(
        route_kernel, (triton.cdiv(N, rows),),
        x, first, bias if first_bias is None else first_bias, out, bias,
        bias if tilt is None else tilt, concentration,
        choice, N, dim, x.stride(0), floor, EPSILON, HIDDEN=hidden, R=R, E=E,
        TILTED=tilt is not None, SPLIT=narrow,
        BM=rows, BK=columns, HP=width, RP=units, EP=experts, num_warps=4,
        num_stages=3 if width <= 128 else 2,
    )  # fmt: skip
