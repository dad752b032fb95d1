"""Gated linear attention: linear attention that forgets, at a rate that each key decides."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_router.attention.experts.contract import Kernel, register_expert
from bayes_router.attention.experts.sums import SumExpert
from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.eager import rows_linear
from bayes_router.attention.kernels.eager.chunks import causal_sum, normalised, with_ones
from bayes_router.attention.kernels.triton import operators
from bayes_router.attention.shapes import ExpertShape, repeat_heads, unit_heads, widen

ALL = slice(None)
# share of the rows beyond which computing all of them is faster (CPU, T 1024 and 8192, H 8, Dh 64)
MOST_ROWS = 0.75


@register_expert("gated")
class GatedLinearAttention(SumExpert):
    """phi(q_t) S_t / (phi(q_t) z_t), where the state fades by a gate.

    S_t = a_t S_{t-1} + phi(k_t) v_t^T, z_t = a_t z_{t-1} + phi(k_t).

    The gate a_t = sigmoid(w_h . k_t + b_h) in (0, 1) is one number a head, as in Mamba-2 (Dao and
    Gu 2024, arXiv 2405.21060) and, per channel, in Yang et al. 2023 (arXiv 2312.06635); here it
    reads the shared key. phi(x) = softmax(s_h x), a sharper map than elu + 1. Half of the heads
    start with memories of about 8 to 64 tokens, half of 128 to 1024.
    """

    kernel = Kernel.GATED
    cost_ratio = 0.15

    def __init__(self, shape: ExpertShape):
        super().__init__(shape)
        heads, dim = shape.num_heads, shape.head_dim
        self.gate = nn.Parameter(torch.zeros(heads, dim))
        memory = torch.logspace(3, 10, heads, base=2.0)  # tokens
        self.gate_bias = nn.Parameter(torch.log(memory))  # sigmoid(log m) = 1 - 1 / (m + 1)
        self.log_scale = nn.Parameter(torch.zeros(heads))

    def feature(self, x: Tensor, heads: slice = ALL) -> Tensor:
        """phi(x), of the shape of x, one scale a query head (of `heads`); float32 at least."""
        return (widen(x) * self.log_scale[heads].exp()[:, None, None]).softmax(-1)

    def log_gate(self, k: Tensor, heads: slice = ALL) -> Tensor:
        """The logarithms of the gates [B, H, T], of keys one a query head."""
        return F.logsigmoid(
            (widen(k) * self.gate[heads, None]).sum(-1) + self.gate_bias[heads, None]
        )

    @property
    def fixed_map(self) -> bool:
        """Whether features and gates are those of this class, which kernels know.

        A subclass may have its own.
        """
        own, base = type(self), GatedLinearAttention
        return own.feature is base.feature and own.log_gate is base.log_gate

    def entries(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `SumExpert.entries`; the heads are those of the queries."""
        k, v = (repeat_heads(x, self.shape.num_heads) for x in (k, v))
        return self.feature(k), with_ones(widen(v)), self.log_gate(k)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q) [B, H, Tq, Dh], phi(k) [B, H, Tk, Dh] and log a [B, H, Tk]: what the kernels take.

        Features in the dtype of q, or bfloat16 for float16 (`kernels.capability.feature_dtype`).
        """
        if self.fixed_map and capability.computes(q, k):
            return operators.features(q, k, self.gate, self.gate_bias, self.log_scale)
        k, kind = repeat_heads(k, q.shape[1]), capability.feature_dtype(q.dtype)
        return self.feature(q).to(kind), self.feature(k).to(kind), self.log_gate(k)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        if capability.available(q, k, v):
            phi_q, phi_k, log_gate = self.features(q, k)
            return operators.linear_attention(phi_q, phi_k, v, log_gate)
        past = k.shape[2] - q.shape[2]
        if past == 0 or q.shape[2] == 0:
            return self.extend(q, k[:, :, past:], v[:, :, past:], self.init_state(q, k, v))[0]
        none = q[:, :, :1].expand(-1, -1, past, -1)  # the past needs its state alone
        state = self.extend(none, k[:, :, :past], v[:, :, :past], self.init_state(q, k, v))[1]
        return self.extend(q, k[:, :, past:], v[:, :, past:], state)[0]

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        """See `Expert.attend_rows`."""
        return self.attend_units(q, k, v, chosen[..., None])

    def attend_units(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        """See `Expert.attend_units`.

        On a CPU the state takes the keys up to a unit's last row, and its chosen rows read it.
        """
        # elsewhere the host counts no rows
        own = self.kernel is Kernel.GATED and q.device.type == "cpu"
        if not own or int(chosen.sum()) > MOST_ROWS * chosen.numel():
            return super().attend_rows(q, k, v, chosen.any(-1))
        units = unit_heads(chosen.shape[2], q.shape[1], k.shape[1])
        found = []
        for b, taken in enumerate(chosen):
            each = zip(units, taken.unbind(1), strict=True)
            found.append(
                torch.cat(
                    [
                        self._rows(q[b, h], k[b, kv], v[b, kv], of.nonzero()[:, 0], h)
                        for (h, kv), of in each
                    ]
                )
            )
        return torch.stack(found)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, heads: slice) -> Tensor:
        """[H, Tq, Dh] of some heads of one sequence: the given rows, and zeros."""
        out = q.new_zeros(q.shape[1], q.shape[0], q.shape[2])
        if rows.numel():
            chunk = partial(self._chunk, heads)
            found = [part for _, part in rows_linear.linear_rows(q, k, v, rows, features=chunk)]
            out = out.index_copy(0, rows, torch.cat(found).to(q.dtype))
        return out.transpose(0, 1)

    def _chunk(self, heads: slice, queries: Tensor, k: Tensor, v: Tensor) -> rows_linear.Features:
        k, v = (repeat_heads(x[None], len(queries)) for x in (k, v))
        phi_q, phi_k = self.feature(queries[None], heads), self.feature(k, heads)
        phi_q, phi_k, values = (x[0].contiguous() for x in (phi_q, phi_k, widen(v)))
        return rows_linear.Features(phi_q, phi_k, values, self.log_gate(k, heads)[0])

    def init_state(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Zeros [B, H, Dh, Dh + 1]: S and, in the last column, z."""
        return torch.zeros(
            *q.shape[:2],
            k.shape[3],
            v.shape[3] + 1,
            device=k.device,
            dtype=widen(v[:, :, :0]).dtype,
        )

    def extend_segment(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Expert.extend_segment`."""
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        phi_q, phi_k = self.feature(q), self.feature(k)
        summed, after = causal_sum(phi_q, phi_k, with_ones(widen(v)), self.log_gate(k), state)
        return normalised(summed).to(v.dtype), after

    def flops_per_token(self, context: int) -> float:
        """As linear attention, and 2 Dh for the gate of each head."""
        dim = self.shape.head_dim
        return self.shape.num_heads * (4 * dim * (dim + 1) + 2 * dim)
