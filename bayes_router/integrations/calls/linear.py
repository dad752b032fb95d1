"""Linear attention for a pretrained layer.

Feature maps that are learned from the layer's own softmax attention.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_router.attention.kernels.eager.chunks import causal_sum, end_state, normalised, with_ones
from bayes_router.attention.shapes import ExpertShape, repeat_heads, widen
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.memory import Running
from bayes_router.integrations.calls.softmax import QUERIES, PatchedExpert


class LinearExpert(PatchedExpert):
    """phi_q(q_t) . sum_s phi_k(k_s) v_s / (phi_q(q_t) . sum_s phi_k(k_s)).

    The sums go over the keys s that the layer's mask shows t.

    phi(x) = softmax(M x) with one learned M [F, Dh] a head, F = Dh, in the manner of Zhang et al.
    2024 (arXiv 2402.04347); M starts at the identity, scaled so that phi_q . phi_k grows with the
    layer's own scores. It takes the queries and keys as the layer hands them over, rotary positions
    included. Computed in float32 at least.

    A causal pass without other masks than padding costs O(T): a running state between chunks. One
    new token behind a KV cache reads a state that is kept beside it (`LayerMemory`) and costs the
    same at any length. With any other mask, for several queries behind a cache, and with gradients,
    weights are formed query by key (O(T) a token).
    """

    def __init__(self, shape: ExpertShape, kv_heads: int, sinks: int = 0):
        super().__init__(shape, kv_heads, sinks)
        # the product of both is sqrt(Dh) x scaled scores
        start = torch.eye(shape.head_dim) * shape.head_dim**0.25
        self.query_map = nn.Parameter(start.repeat(shape.num_heads, 1, 1))  # [H, F, Dh]
        self.key_map = nn.Parameter(start.repeat(kv_heads, 1, 1))  # [Hkv, F, Dh]

    def forward(self, call: AttentionCall) -> Tensor:
        """See `PatchedExpert.forward`."""
        if (
            call.memory is not None
            and call.memory.known
            and call.q.shape[2] == 1
            and not self.needs_grad(call)
        ):
            # [B, Hkv, G, F]
            phi_q = (
                self._phi(call.q, self.query_map, call)
                .unflatten(1, (call.k.shape[1], -1))
                .squeeze(3)
            )
            summed = (phi_q @ self.running(call)).flatten(1, 2).unsqueeze(2)
            return normalised(summed).to(call.v.dtype)
        phi_q = self._phi(call.q, self.query_map, call)  # [B, H, Tq, F]
        phi_k = self._phi(call.k, self.key_map, call)  # [B, Hkv, Tk, F]
        value = with_ones(widen(call.v))  # [B, Hkv, Tk, Dv + 1]
        decay = self._log_decay(call)  # [B, Hkv, Tk], 0 or less; None: nothing is forgotten
        real = self._real(call)
        if real is not None:  # padding adds nothing to the state and keeps it
            phi_k = phi_k * real[:, None, :, None]
            decay = decay if decay is None else decay * real[:, None]
        H, Tq, Tk = call.q.shape[1], call.q.shape[2], call.k.shape[2]
        phi_k, value = repeat_heads(phi_k, H), repeat_heads(value, H)
        decay = decay if decay is None else repeat_heads(decay, H)
        if not (call.dense or call.padding is not None) or (call.causal and (Tq != Tk or Tq == 1)):
            summed = self._weights_by_key(call, phi_q, phi_k, value, decay)
        elif call.causal:
            summed, _ = causal_sum(phi_q, phi_k, value, decay)
        else:
            summed = phi_q @ (phi_k.mT @ value)
        return normalised(summed).to(call.v.dtype)

    @staticmethod
    def _phi(x: Tensor, weight: Tensor, call: AttentionCall) -> Tensor:
        return (widen(x) * call.scaling**0.5 @ weight.mT).softmax(-1)

    def needs_grad(self, call: AttentionCall) -> bool:
        """Whether autograd records this call: no state is kept then."""
        return torch.is_grad_enabled() and (
            self.query_map.requires_grad or call.q.requires_grad or call.k.requires_grad
        )

    def running(self, call: AttentionCall) -> Tensor:
        """The state of all keys of the call, [B, Hkv, F, Dv + 1].

        What the memory holds, and the keys since.
        """
        memory = call.memory
        assert memory is not None
        before = memory.running.get(type(self))
        start = 0 if before is None else before.length
        if before is not None and start == call.k.shape[2]:
            return before.state
        late = replace(call, k=call.k[:, :, start:], v=call.v[:, :, start:])
        phi_k, value = self._phi(late.k, self.key_map, call), with_ones(widen(late.v))
        decay = self._log_decay(late)  # [B, Hkv, n]
        if memory.real is not None:
            real = memory.real[:, None, start:]
            phi_k, decay = phi_k * real.unsqueeze(-1), decay if decay is None else decay * real
        state = end_state(phi_k, value, decay, None if before is None else before.state)
        memory.running[type(self)] = Running(state, call.k.shape[2])
        return state

    def _real(self, call: AttentionCall) -> Tensor | None:
        """[B or 1, Tk]; what one new token does not see is padding, or too far back to matter."""
        if call.padding is None and call.mask is not None and call.q.shape[2] == 1:
            return call.visible()[:, 0, -1]
        return call.padding

    def _log_decay(self, call: AttentionCall) -> Tensor | None:
        return None

    def _weights_by_key(
        self, call: AttentionCall, phi_q: Tensor, phi_k: Tensor, value: Tensor, decay: Tensor | None
    ) -> Tensor:
        """[B, H, Tq, Dv + 1], in blocks of queries; the queries are the last of the keys."""
        elapsed, visible = None if decay is None else decay.cumsum(-1), call.visible()  # [B, H, Tk]
        Tq, Tk = phi_q.shape[2], phi_k.shape[2]
        blocks = []
        for start in range(0, Tq, QUERIES):
            rows = slice(start, min(start + QUERIES, Tq))
            weights = phi_q[:, :, rows] @ phi_k.mT * visible[:, :, rows]  # [B, H, n, Tk]
            if elapsed is not None:
                since = elapsed[:, :, Tk - Tq :][:, :, rows, None] - elapsed[:, :, None]
                weights = weights * since.clamp_max(0).exp()
            blocks.append(weights @ value)
        return torch.cat(blocks, 2)


class GatedExpert(LinearExpert):
    """Linear attention that forgets.

    What key s wrote is multiplied by a_r = sigmoid(w . k_r + b) for every later key r.

    One gate a key head, read from the keys. Causal layers only. Heads start with memories of 8 to
    1024 tokens, as the expert of the same name in `attention`.
    """

    def __init__(self, shape: ExpertShape, kv_heads: int, sinks: int = 0):
        super().__init__(shape, kv_heads, sinks)
        self.gate = nn.Parameter(torch.zeros(kv_heads, shape.head_dim))
        self.gate_bias = nn.Parameter(torch.logspace(3, 10, kv_heads, base=2.0).log())

    def _log_decay(self, call: AttentionCall) -> Tensor:
        return F.logsigmoid((widen(call.k) * self.gate[:, None]).sum(-1) + self.gate_bias[:, None])
