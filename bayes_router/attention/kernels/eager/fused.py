"""torch's fused softmax attention, with right gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention` with `keep_layout`."""
    return keep_layout(F.scaled_dot_product_attention(q, k, v, **options))


def keep_layout(out: Tensor) -> Tensor:
    """What fused attention gave, with a gradient in the layout of this output.

    Its backward pass on CUDA needs that.

    That of cuDNN keeps the graph it built for the first gradient, by the shapes and strides of
    queries, keys and values alone: a later gradient in another layout is read by the strides of the
    first (torch 2.11, cuDNN 9.19, H100: gradients off by 140%, without a word).
    """
    return _KeepLayout.apply(out) if out.is_cuda and out.requires_grad else out


class _KeepLayout(torch.autograd.Function):
    """The identity; its gradient comes in the strides of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.strides = x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (grad,) = gradients
        if grad.stride() == ctx.strides:
            return grad
        return grad.new_empty_strided(grad.shape, ctx.strides).copy_(grad)
