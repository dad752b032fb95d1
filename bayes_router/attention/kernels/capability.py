"""What the Triton kernels compute, asked without importing Triton."""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

HAS_TRITON = find_spec("triton") is not None
"""Whether the package is installed; looked up once, for it takes longer than a launch."""

LOG2_E = 1.4426950408889634
"""Kernels take powers of 2: exp(x) = 2 ^ (LOG2_E x)."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute."""
HEAD_SIZE, HEAD_SIZE_FLOAT32 = 256, 128
"""The largest heads that they hold; shared memory ends there."""


def lacks(x: Tensor, most: int = HEAD_SIZE) -> str | None:
    """What is missing for a kernel to take x [B, H, T, Dh] with heads up to `most`.

    None where nothing is.
    """
    if not x.is_cuda:
        return f"it needs CUDA tensors; these are on {x.device}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if x.dtype not in TYPES:
        return f"it computes float32, bfloat16 and float16; these are {x.dtype}"
    most = min(most, HEAD_SIZE_FLOAT32) if x.dtype == torch.float32 else most
    return (
        f"it holds head sizes up to {most} in {x.dtype}; this is {x.shape[3]}"
        if x.shape[3] > most
        else None
    )


def computes(*xs: Tensor) -> bool:
    """Whether the kernels take these: on CUDA, of one type and a head size that they compute."""
    x = xs[0]
    kind = HAS_TRITON and x.is_cuda and x.dtype in TYPES
    return kind and all(y.dtype == x.dtype for y in xs) and x.shape[3] <= HEAD_SIZE


def available(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels attend over these.

    As many queries as keys, and heads whose state fits into registers.
    """
    most = 64 if q.dtype == torch.float32 else 128
    return computes(q, k, v) and 0 < q.shape[2] == k.shape[2] and q.shape[3] <= most


def ceil_div(a: int, b: int) -> int:
    """The least whole number of at least a / b; Triton's own takes microseconds on the host."""
    return -(-a // b)


def power_of_2(least: int) -> int:
    """The least power of 2 that is at least `least` >= 1."""
    return 1 << (least - 1).bit_length()


def head_size(dim: int) -> int:
    """The head size that the kernels take: a power of two, at least 16."""
    return max(16, power_of_2(dim))


def padded(x: Tensor, value: float = 0.0) -> Tensor:
    """The tensor [B, H, T, Dh] filled with `value` up to the head size that the kernels take."""
    extra = head_size(x.shape[3]) - x.shape[3]
    return F.pad(x, (0, extra), value=value) if extra else x


def packed(x: Tensor) -> Tensor:
    """The tensor [B, H, T, Dh], contiguous along its last dimension."""
    return x if x.stride(3) == 1 else x.contiguous()


def feature_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of features and of their gradients.

    A denominator that is nearly nothing sends these past what float16 holds.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype
