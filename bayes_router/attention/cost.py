"""What attention costs: analytic FLOPs and bytes per token by expert, of attention alone and of the whole model.

Multiply-adds count as two. Elementwise work (softmax, feature maps, norms) is left out, as torch's flop counter does.
Means over a causal pass are over its tokens; a decoding step is the one token that makes the context `context` long.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_router.attention.expert import Expert
from bayes_router.attention.full import FullAttention
from bayes_router.attention.latency import measured_latencies
from bayes_router.types import CostModel, choose


class Mode(Enum):
    """Which pass is counted."""

    PREFILL = "prefill"  # mean over the tokens of one causal pass over the context
    DECODE = "decode"  # the last token of the context, with the rest cached


class AttentionCost(NamedTuple):
    """Of one layer, per token: what its own expert costs, and what every token pays whatever its route."""

    own: Tensor  # [E] float64
    shared: float

    def mean(self, load: Tensor) -> float:
        """Realised cost per token when the fractions `load` [E] of the tokens took each expert."""
        return float(load.double() @ self.own) + self.shared


def cost_ratios(
    experts: Sequence[Expert], model: CostModel, context: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Cost of each expert relative to full attention (full = 1): float32 [E].

    PAPER takes `Expert.cost_ratio`; FLOPS the analytic count at `context` tokens; LATENCY the median time of a causal pass
    over `context` tokens on `device` (default: CUDA where there is one), measured once and cached. Under FLOPS and LATENCY
    a ratio exceeds 1 where the expert loses: linear below about 2 Dh tokens.

    Raises:
        ValueError: no experts, `context` below 1, or an unknown cost model.
    """
    model = choose("cost_model", model, CostModel)
    if not experts:
        raise ValueError("experts: expected at least one; got none")
    if context < 1:
        raise ValueError(f"context: expected at least 1 token; got {context}")
    if model is CostModel.PAPER:
        return torch.tensor([expert.cost_ratio for expert in experts])
    full = FullAttention(experts[0].shape)
    if model is CostModel.FLOPS:
        costs = [expert.flops_per_token(context) for expert in (full, *experts)]
    else:
        costs = measured_latencies((full, *experts), context, device)
    return torch.tensor(costs[1:], dtype=torch.float64).div(costs[0]).float()


def flops(expert: Expert, context: int, mode: Mode = Mode.PREFILL) -> float:
    """FLOPs per token of one layer's attention, all heads, without projections."""
    if mode is Mode.PREFILL:
        return expert.flops_per_token(context)
    before = expert.flops_per_token(context - 1) * (context - 1) if context > 1 else 0.0
    return expert.flops_per_token(context) * context - before  # what the last token added


def read_bytes(expert: Expert, context: int, num_kv_heads: int, element_size: int, mode: Mode = Mode.PREFILL) -> float:
    """Bytes per token that the expert must move at least: q, k, v and out once in a causal pass.

    In decoding: the keys and values it sees, or its state read and written once.
    """
    num_heads, head_dim = expert.shape[:2]
    if mode is Mode.PREFILL:
        return 2 * (num_heads + num_kv_heads) * head_dim * element_size
    if expert.stateful:
        return 2 * state_bytes(expert, num_kv_heads)
    return 2 * num_kv_heads * head_dim * element_size * expert.keys_read(context)


def state_bytes(expert: Expert, num_kv_heads: int) -> int:
    """Size of the state of one sequence; 0 for an expert that keeps none."""
    if not expert.stateful:
        return 0
    num_heads, head_dim = expert.shape[:2]
    q = torch.empty(1, num_heads, 1, head_dim, device="meta")
    k = torch.empty(1, num_kv_heads, 1, head_dim, device="meta")
    state = expert.init_state(q, k, k)
    return state.numel() * state.element_size()


def hard_flops(experts: Sequence[Expert], context: int, num_kv_heads: int, mode: Mode = Mode.PREFILL) -> AttentionCost:
    """What hard routing executes: each token its own expert; every token also enters the state of each stateful expert.

    The shared part of a stateful expert is 2 FLOPs for each element of its state (an outer product added).
    """
    own, shared = [], 0.0
    for expert in experts:
        update = 2.0 * state_bytes(expert, num_kv_heads) / 4
        shared += update
        own.append(max(flops(expert, context, mode) - update, 0.0))
    return AttentionCost(torch.tensor(own, dtype=torch.float64), shared)


def hard_decode_bytes(experts: Sequence[Expert], context: int, num_kv_heads: int, element_size: int) -> AttentionCost:
    """The byte floor of a decoding step: each row reads what its expert sees; all rows write k, v and update every state."""
    head_dim = experts[0].shape.head_dim
    own = [
        0.0 if expert.stateful else read_bytes(expert, context, num_kv_heads, element_size, Mode.DECODE) for expert in experts
    ]
    shared = 2.0 * num_kv_heads * head_dim * element_size + sum(2.0 * state_bytes(e, num_kv_heads) for e in experts)
    return AttentionCost(torch.tensor(own, dtype=torch.float64), shared)


def matmul_weights(model: nn.Module) -> int:
    """Weights that multiply every token: those of the model's `nn.Linear` modules, one shared twice counted twice."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def model_flops(weights: int, attention: Iterable[float]) -> float:
    """FLOPs per token of a whole model: 2 for each of `weights`, and the attention of each layer."""
    return 2.0 * weights + sum(attention)
