# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""How far hidden states are from the text of a fit, in one launch a layer.

    r = 1 / sqrt(mean(x^2) + eps)                     the scale of the root mean square norm, or 1
    distance = sum_k (r W_k x - c_k)^2 / K

W_k are the K whitened directions of `routing.evidence`, c the centre in them. x is read once, in
its own dtype; all else is float32, for the directions are those in which text hardly varies: what
is left of long products that nearly cancel.
"""

import triton
import triton.language as tl
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div, power_of_2
from bayes_router.attention.kernels.triton.launch import follow, launch
from bayes_router.attention.kernels.triton.route import RMS_EPSILON


@triton.jit
def distance_kernel(
    X, W, C, Out, N, DIM, x_n, epsilon,
    K: tl.constexpr, NORMED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Program: BM tokens. KP is K up to a power of two that tensor products take."""
    follow()
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    real = n < N
    at, k0 = tl.arange(0, KP), tl.arange(0, BK)
    inside = at < K
    acc = tl.zeros([BM, KP], tl.float32)
    square = tl.zeros([BM], tl.float32)
    for k in range(0, DIM, BK):
        cols = k + k0
        there = cols[None, :] < DIM
        x = tl.load(
            X + n[:, None].to(tl.int64) * x_n + cols[None, :], mask=real[:, None] & there, other=0.0
        ).to(tl.float32)
        w = tl.load(W + at[:, None] * DIM + cols[None, :], mask=inside[:, None] & there, other=0.0)
        square += tl.sum(x * x, 1)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    z = acc * (1.0 / tl.sqrt(square / DIM + epsilon))[:, None] if NORMED else acc
    z -= tl.load(C + at, mask=inside, other=0.0)[None, :]
    tl.store(Out + n, tl.sum(z * z, 1) / K, mask=real)


def launch_distance(
    x: Tensor, directions: Tensor, centre: Tensor, out: Tensor, normed: bool
) -> None:
    """Writes out [N], float32, of x [N, D], whose last dimension is contiguous.

    directions [K, D] and centre [K], float32 and contiguous. Not `normed`: x is taken as it is.
    """
    (N, dim), K = x.shape, len(centre)
    rows = 16 if N < 4096 else 64
    launch(
        distance_kernel, (ceil_div(N, rows),), x, directions, centre, out, N, dim, x.stride(0),
        RMS_EPSILON, K=K, NORMED=normed, BM=rows, BK=32,
        KP=max(16, power_of_2(K)), num_warps=4, num_stages=3,
    )  # fmt: skip
