# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""One launch from the hidden states of a layer to its posterior and its choices, for all routing
units.

    r = 1 / sqrt(mean(x^2) + eps)        the scale of the root mean square norm, or 1
    z = W2 silu(r W1 x + b1) + b2        or r W x + b, where the controller is linear
    concentration = floor + softplus(z)
    choice = argmax_e concentration, or argmax_e log concentration - tilt

x is read once, in its own dtype. Float32 weights beside bfloat16 or float16 inputs are each the
sum of two halves of that type, whose products with x tensor cores take exactly, so that the result
is float32's. What follows the first product is float32 throughout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div, power_of_2
from bayes_router.attention.kernels.triton.launch import follow, launch

RMS_EPSILON = 1.1920928955078125e-07  # of float32, as torch's rms_norm takes it


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
def _columns(R: tl.constexpr, E: tl.constexpr, RP: tl.constexpr, EP: tl.constexpr):
    """Of the last product's columns: which are there, and their rows of W2, B2 and Tilt."""
    column = tl.arange(0, RP * EP)
    unit, expert = column // EP, column % EP
    return (unit < R) & (expert < E), unit * E + expert


@triton.jit
def _first_rows(
    HIDDEN: tl.constexpr, HP: tl.constexpr, R: tl.constexpr, E: tl.constexpr, RP: tl.constexpr,
    EP: tl.constexpr,
):  # fmt: skip
    """Of the first product's columns: which are there, and their rows of W1."""
    if HIDDEN:
        at = tl.arange(0, HP)
        inside = at < HIDDEN
    else:
        inside, at = _columns(R, E, RP, EP)
    return inside, at


@triton.jit
def _product(
    X, W1, n, real, at, inside, lo, hi, DIM, x_n, SPLIT: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """Over the columns lo .. hi of x: its product with the rows `at` of W1, and its squares."""
    k0 = tl.arange(0, BK)
    acc = tl.zeros([BM, HP], tl.float32)
    square = tl.zeros([BM], tl.float32)
    for k in range(lo, hi, BK):
        cols = k + k0
        there = cols[None, :] < DIM
        x = tl.load(
            X + n[:, None].to(tl.int64) * x_n + cols[None, :], mask=real[:, None] & there, other=0.0
        )
        w = tl.load(W1 + at[:, None] * DIM + cols[None, :], mask=inside[:, None] & there, other=0.0)
        wide = x.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        acc = _times(x, w, acc, SPLIT)
    return acc, square


@triton.jit
def _choose(
    acc, square, at, inside, n, real, B1, W2, B2, Tilt, Concentration, Choice, DIM, floor, epsilon,
    HIDDEN: tl.constexpr, R: tl.constexpr, E: tl.constexpr, TILTED: tl.constexpr,
    NORMED: tl.constexpr, BM: tl.constexpr, RP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """From the first product to the posterior and the choice, which are written."""
    there, row = _columns(R, E, RP, EP)
    z = acc * (1.0 / tl.sqrt(square / DIM + epsilon))[:, None] if NORMED else acc
    if HIDDEN:
        z += tl.load(B1 + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        z = z / (1.0 + tl.exp(-z))
        w = tl.load(
            W2 + row[:, None] * HIDDEN + at[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        z = tl.dot(z, tl.trans(w.to(tl.float32)), input_precision="ieee")
    z += tl.load(B2 + row, mask=there, other=0.0).to(tl.float32)[None, :]
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


@triton.jit
def route_kernel(
    X, W1, B1, W2, B2, Tilt, Concentration, Choice, N, DIM, x_n, floor, epsilon,
    HIDDEN: tl.constexpr, R: tl.constexpr, E: tl.constexpr, TILTED: tl.constexpr,
    NORMED: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Program: BM tokens.

    RP and EP are R and E up to powers of two, HP the first product's width.
    """
    follow()
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    real = n < N
    inside, at = _first_rows(HIDDEN, HP, R, E, RP, EP)
    acc, square = _product(X, W1, n, real, at, inside, 0, DIM, DIM, x_n, SPLIT, BM, BK, HP)
    _choose(
        acc, square, at, inside, n, real, B1, W2, B2, Tilt, Concentration, Choice, DIM, floor,
        epsilon, HIDDEN, R, E, TILTED, NORMED, BM, RP, EP,
    )  # fmt: skip


@triton.jit
def part_kernel(
    X, W1, Partial, Square, N, DIM, x_n, PART,
    HIDDEN: tl.constexpr, R: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Program (BM tokens, PART columns of x): its part of the first product and of the squares."""
    follow()
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    inside, at = _first_rows(HIDDEN, HP, R, E, RP, EP)
    lo = tl.program_id(1) * PART
    acc, square = _product(X, W1, n, n < N, at, inside, lo, lo + PART, DIM, x_n, SPLIT, BM, BK, HP)
    slot = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * BM + tl.arange(0, BM)
    tl.store(Partial + slot[:, None] * HP + tl.arange(0, HP)[None, :], acc)
    tl.store(Square + slot, square)


@triton.jit
def join_parts_kernel(
    Partial, Square, B1, W2, B2, Tilt, Concentration, Choice, N, DIM, floor, epsilon,
    HIDDEN: tl.constexpr, R: tl.constexpr, E: tl.constexpr, TILTED: tl.constexpr,
    NORMED: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr,
    EP: tl.constexpr,
):  # fmt: skip
    """Program: BM tokens, whose S parts are summed."""
    follow()
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    inside, at = _first_rows(HIDDEN, HP, R, E, RP, EP)
    slot = tl.program_id(0) * S * BM + tl.arange(0, BM)
    acc = tl.zeros([BM, HP], tl.float32)
    square = tl.zeros([BM], tl.float32)
    for s in tl.static_range(S):
        mine = slot + s * BM
        acc += tl.load(Partial + mine[:, None] * HP + tl.arange(0, HP)[None, :])
        square += tl.load(Square + mine)
    _choose(
        acc, square, at, inside, n, n < N, B1, W2, B2, Tilt, Concentration, Choice, DIM, floor,
        epsilon, HIDDEN, R, E, TILTED, NORMED, BM, RP, EP,
    )  # fmt: skip


def pieces(tokens: int, width: int, dim: int) -> tuple[int, int]:
    """Tokens of a program, and the parts that their x is cut into.

    What an H100 was fastest with, for accumulators of this width. Every program reads the weights
    of its part, one tile after the other; of a short text too few would wait for too many.
    """
    if tokens <= 64:
        return 16, 16
    rows = 64 if width <= 128 else 32
    if tokens <= 4096:
        return rows, ceil_div(dim, 512)
    return (128 if tokens >= 16_384 and width <= 64 else rows), 1


def launch_route(
    x: Tensor, first: Tensor, first_bias: Tensor | None, out: Tensor, bias: Tensor,
    tilt: Tensor | None, floor: float,
    concentration: Tensor, choice: Tensor, normed: bool = True,
) -> None:  # fmt: skip
    """Writes concentration [N, R, E] and choice [N, R] of x [N, D], whose last dimension is
    contiguous.

    `first` [hidden, D] with its bias and `out` [R E, hidden]; or, of a linear controller, `first`
    [R E, D] without one, and `out` is not read. Weights are contiguous, float32 or of the type of
    x; tilt [R E]. Not `normed`: x is taken as it is (r = 1).
    """
    (N, R, E), dim = concentration.shape, x.shape[1]
    hidden = 0 if first_bias is None else len(first)
    experts = power_of_2(E)
    units = max(power_of_2(R), 16 // experts)
    width = max(16, power_of_2(hidden)) if hidden else units * experts
    narrow = x.element_size() == 2
    sizes = {"HIDDEN": hidden, "R": R, "E": E}
    split = narrow and first.dtype == torch.float32
    chosen = {"TILTED": tilt is not None, "NORMED": normed}
    padded = {"HP": width, "RP": units, "EP": experts, "num_warps": 4}
    rest = bias if first_bias is None else first_bias, out, bias, bias if tilt is None else tilt
    step = 64 if narrow else 32
    rows, parts = pieces(N, width, dim)
    rows = rows if narrow else min(rows, 32)
    part = ceil_div(ceil_div(dim, parts), step) * step
    blocks, parts = ceil_div(N, rows), ceil_div(dim, part)
    if parts == 1:
        launch(
            route_kernel, (blocks,), x, first, *rest, concentration, choice, N, dim, x.stride(0),
            floor, RMS_EPSILON, **sizes, **chosen, SPLIT=split, BM=rows, BK=step, **padded,
            num_stages=3 if width <= 128 else 2,
        )  # fmt: skip
        return
    values = torch.empty(blocks * parts * rows, width, device=x.device, dtype=torch.float32)
    squares = torch.empty(len(values), device=x.device, dtype=torch.float32)
    launch(
        part_kernel, (blocks, parts), x, first, values, squares, N, dim, x.stride(0), part,
        **sizes, SPLIT=split, BM=rows, BK=step, **padded,
    )  # fmt: skip
    launch(
        join_parts_kernel, (blocks,), values, squares, *rest, concentration, choice, N, dim,
        floor, RMS_EPSILON, **sizes, **chosen, S=parts, BM=rows, **padded,
    )  # fmt: skip
