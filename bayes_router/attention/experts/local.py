"""Sliding-window attention.

Every token sees the last W tokens, itself included, and the first `sinks`.
"""

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert, Kernel, register_expert
from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.eager.band import MIN_BLOCK, banded, by_blocks
from bayes_router.attention.kernels.eager.fused import fused_attention
from bayes_router.attention.kernels.triton import operators
from bayes_router.attention.shapes import ExpertShape, causal_positions, segments


@register_expert("local")
class LocalAttention(Expert):
    """softmax(q k^T / sqrt(Dh)) v over a window of keys and the sinks.

    The query at position t sees the keys n <= t with t - n < W or n < sinks.

    Banded: O(T (W + sinks)) work and O(T) memory for fixed W. Pretrained decoders park attention on
    their first tokens; a window without these sinks costs them much more (Xiao et al. 2023, arXiv
    2309.17453).
    """

    kernel = Kernel.LOCAL
    cost_ratio = 0.30

    def __init__(self, shape: ExpertShape):
        super().__init__(shape)
        if shape.window < 1:
            raise ValueError(
                f"window: expected at least 1 (a token sees itself); got {shape.window}"
            )
        if shape.sinks < 0:
            raise ValueError(f"sinks: expected 0 or more tokens; got {shape.sinks}")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        if q.shape[2] > self.shape.window and capability.available(q, k, v):
            return operators.local_attention(q, k, v, self.shape.window, self.shape.sinks)
        past = k.shape[2] - q.shape[2]
        pieces = segments(q.shape[2], q.device)
        if len(pieces) > 1:
            parts = [
                self._attend(q[:, :, a:b], k[:, :, : past + b], v[:, :, : past + b])
                for a, b in pieces
            ]
            return torch.cat(parts, 2)
        return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, Tq, Tk = self.shape.window, q.shape[2], k.shape[2]
        older = max(Tk - Tq - window + 1, 0)  # keys before every window
        if window < Tk - older and window >= 2 * MIN_BLOCK and self._apart(q, k, v):
            return by_blocks(q, k, v, window)
        if window < Tk - older and Tq > MIN_BLOCK:
            return banded(q, k, v, window, self.shape.sinks)
        query, key = causal_positions(Tq, Tk, q.device)
        sinks = min(self.shape.sinks, older)
        k, v, key = (_without(x, sinks, older, dim) for x, dim in ((k, 2), (v, 2), (key, 1)))
        seen = (key <= query) & ((key > query - window) | (key < self.shape.sinks))
        return fused_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])

    def _apart(self, *inputs: Tensor) -> bool:
        """Whether blocks may be computed one by one: on a CPU, where a gradient of views of keys
        would cost more than it saves, and without sinks.
        """
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return not self.shape.sinks and inputs[0].device.type == "cpu" and not grad

    def reach(self, num_keys: int) -> int | None:
        """The window; None where sinks stand before it."""
        window = self.shape.window
        return None if self.shape.sinks and window < num_keys else min(window, num_keys)

    def keys_read(self, context: int) -> int:
        """The sinks and the window, or all there are."""
        return min(self.shape.window + self.shape.sinks, context)

    def flops_per_token(self, context: int) -> float:
        """As full attention with min(t, W + sinks) visible keys at position t, counted from 1."""
        most = self.keys_read(context)
        visible = most * (context - (most - 1) / 2) / context
        return 4 * self.shape.num_heads * self.shape.head_dim * visible


def _without(x: Tensor, start: int, stop: int, dim: int) -> Tensor:
    """`x` without start .. stop of a dimension; a view where nothing is before `start`."""
    rest = x.narrow(dim, stop, x.shape[dim] - stop)
    return torch.cat([x.narrow(dim, 0, start), rest], dim) if start else rest
