"""Full softmax attention: every token sees all tokens up to itself."""

from torch import Tensor

from bayes_router.attention.experts.contract import Expert, Kernel, register_expert
from bayes_router.attention.kernels.eager.fused import fused_attention
from bayes_router.attention.shapes import causal_positions


@register_expert("full")
class FullAttention(Expert):
    """Softmax(q k^T / sqrt(Dh)) v over all positions up to the query's own.

    O(T^2) work, O(T) memory (fused).
    """

    kernel = Kernel.FULL
    cost_ratio = 1.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        grouped = q.shape[1] != k.shape[1]
        if q.shape[2] == k.shape[2]:
            return fused_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if q.shape[2] == 1:  # one new token sees everything
            return fused_attention(q, k, v, enable_gqa=grouped)
        query, key = causal_positions(q.shape[2], k.shape[2], q.device)
        return fused_attention(q, k, v, attn_mask=key <= query, enable_gqa=grouped)

    def reach(self, num_keys: int) -> int:
        """All keys."""
        return num_keys

    def flops_per_token(self, context: int) -> float:
        """For q k^T and p v, 2 Dh multiply-adds a visible key and head.

        A token sees (T + 1) / 2 keys on average.
        """
        return 4 * self.shape.num_heads * self.shape.head_dim * (context + 1) / 2
