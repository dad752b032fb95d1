"""What the Triton kernels compute, asked without importing Triton."""

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
"""Whether the package is installed; looked up once, for it takes longer than a launch."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute."""
HEAD_SIZE, HEAD_SIZE_FLOAT32 = 256, 128
"""The largest heads that they hold; shared memory ends there."""


def lacks(x: Tensor, most: int = HEAD_SIZE) -> str | None:
    """What is missing for a kernel to take x [B, H, T, Dh] with heads up to `most`; None where nothing is."""
    if not x.is_cuda:
        return f"it needs CUDA tensors; these are on {x.device}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if x.dtype not in TYPES:
        return f"it computes float32, bfloat16 and float16; these are {x.dtype}"
    most = min(most, HEAD_SIZE_FLOAT32) if x.dtype == torch.float32 else most
    return f"it holds head sizes up to {most} in {x.dtype}; this is {x.shape[3]}" if x.shape[3] > most else None


def computes(*xs: Tensor) -> bool:
    """Whether the kernels take these: on CUDA, of one type and a head size that they compute."""
    x = xs[0]
    kind = HAS_TRITON and x.is_cuda and x.dtype in TYPES
    return kind and all(y.dtype == x.dtype for y in xs) and x.shape[3] <= HEAD_SIZE


def available(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels attend over these: as many queries as keys, and heads whose state fits into registers."""
    most = 64 if q.dtype == torch.float32 else 128
    return computes(q, k, v) and 0 < q.shape[2] == k.shape[2] and q.shape[3] <= most


def feature_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of features and of their gradients: a denominator that is nearly nothing sends these past what float16 holds."""
    return torch.bfloat16 if dtype == torch.float16 else dtype
