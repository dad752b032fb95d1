"""Linear (kernel) attention.

The past is a sum of outer products, so a token costs the same at any position.
"""

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Kernel, register_expert
from bayes_router.attention.experts.sums import SumExpert
from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.eager.chunks import (
    causal_sum,
    feature_map,
    normalised,
    with_ones,
)
from bayes_router.attention.kernels.triton import operators
from bayes_router.attention.shapes import widen


@register_expert("linear")
class LinearAttention(SumExpert):
    """phi(q_t) S_t / (phi(q_t) z_t), S_t = sum_{s<=t} phi(k_s) v_s^T, z_t = sum_{s<=t} phi(k_s).

    phi = elu + 1.

    Work and memory O(T): inside a chunk the masked product, between chunks the running state.
    Katharopoulos et al. 2020 (arXiv 2006.16236), eqs. 8-12. It takes plain queries and keys: phi of
    rotated ones no longer depends on their distance alone. The state [B, Hkv, Dh, Dh + 1] is
    float32 and holds S and, in its last column, z.
    """

    kernel = Kernel.LINEAR
    cost_ratio = 0.15

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        if capability.available(q, k, v):
            return operators.linear_attention(q, k, v)
        past = k.shape[2] - q.shape[2]
        state = self.init_state(q, k, v)
        if past:
            phi_past = feature_map(widen(k[:, :, :past]))
            state = state + phi_past.transpose(-1, -2) @ with_ones(widen(v[:, :, :past]))
        return self.extend(q, k[:, :, past:], v[:, :, past:], state)[0]

    def init_state(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Zeros [B, Hkv, Dh, Dh + 1]."""
        return torch.zeros(
            *k.shape[:2],
            k.shape[3],
            v.shape[3] + 1,
            device=k.device,
            dtype=widen(v[:, :, :0]).dtype,
        )

    def extend_segment(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Expert.extend_segment`."""
        if q.shape[2] == 1:
            return _step(q, k, v, state)
        phi_q, phi_k = feature_map(widen(q)), feature_map(widen(k))
        summed, after = causal_sum(phi_q, phi_k, with_ones(widen(v)), None, state)
        return normalised(summed).to(v.dtype), after

    def entries(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `SumExpert.entries`; the heads are those of the keys."""
        return feature_map(widen(k)), with_ones(widen(v)), None

    def flops_per_token(self, context: int) -> float:
        """Update and read of the state [Dh, Dh + 1] of each head: 2 Dh (Dh + 1) multiply-adds."""
        dim = self.shape.head_dim
        return 4 * self.shape.num_heads * dim * (dim + 1)


def _step(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: the state with its outer product added, then read."""
    # [B, Hkv, Dh, Dh + 1]
    state = state + feature_map(widen(k)).transpose(-1, -2) * with_ones(widen(v))
    phi_q = feature_map(widen(q)).unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, Hkv, G, Dh]
    summed = phi_q @ state  # [B, Hkv, G, Dh + 1]
    return normalised(summed).flatten(1, 2).unsqueeze(2).to(v.dtype), state
