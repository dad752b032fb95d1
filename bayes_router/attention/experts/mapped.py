"""Gated linear attention with a feature map that is learned."""

import torch
from torch import Tensor, nn

from bayes_router.attention.experts.contract import Kernel, register_expert
from bayes_router.attention.experts.gated import ALL, GatedLinearAttention
from bayes_router.attention.shapes import ExpertShape, widen


@register_expert("mapped")
class MappedGatedAttention(GatedLinearAttention):
    """`GatedLinearAttention` with phi(x) = softmax(s_h M_h x).

    M_h [Dh, Dh] starts at the identity.

    One map for queries and keys, in the manner of Zhang et al. 2024 (arXiv 2402.04347); the gate
    reads the key as it is.
    """

    kernel = Kernel.GATED

    def __init__(self, shape: ExpertShape):
        super().__init__(shape)
        self.map = nn.Parameter(torch.eye(shape.head_dim).repeat(shape.num_heads, 1, 1))

    def feature(self, x: Tensor, heads: slice = ALL) -> Tensor:
        """phi(M x), of the shape of x, one map M [Dh, Dh] a query head (of `heads`).

        float32 at least.
        """
        x = widen(x)
        return super().feature(x @ self.map[heads].mT.to(x.dtype), heads)

    def flops_per_token(self, context: int) -> float:
        """As gated attention, and the map of a query and of a key for each head."""
        return super().flops_per_token(context) + 2 * self.query_flops()

    def query_flops(self) -> float:
        """2 Dh^2 for each head."""
        return 2 * self.shape.num_heads * self.shape.head_dim**2
