"""What attention costs.

Analytic FLOPs and bytes per token by expert, of attention alone and of the whole model.

Multiply-adds count as two. Elementwise work (softmax, feature maps, decay, norms) is left out, as
torch's flop counter does. Means over a causal pass are over its tokens; a decoding step is the one
token that makes the context `context` long.

The hard costs are the least that hard routing has to do. A backend may do more: work in tiles and
chunks, or every row of an expert that computes no rows of its own (`Expert.attend_rows`).
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.experts.full import FullAttention
from bayes_router.attention.latency import measured_latencies
from bayes_router.checks import choose
from bayes_router.types import CostModel


class Mode(Enum):
    """Which pass is counted."""

    PREFILL = "prefill"  # mean over the tokens of one causal pass over the context
    DECODE = "decode"  # the last token of the context, with the rest cached


class Cost(NamedTuple):
    """Per token: what its own expert costs, and what every token pays whatever its route."""

    own: Tensor  # [E] float64
    shared: float

    def mean(self, load: Tensor) -> float:
        """Cost per token when the fractions `load` [E] of the tokens took each expert."""
        return float(load.double() @ self.own) + self.shared


def cost_ratios(
    experts: Sequence[Expert],
    model: CostModel,
    context: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Cost of each expert relative to full attention (full = 1): float32 [E].

    PAPER takes `Expert.cost_ratio`; FLOPS the analytic count at `context` tokens; LATENCY the
    median time of a causal pass over `context` tokens on `device` (default: CUDA where there is
    one), measured once and cached. Under FLOPS and LATENCY a ratio exceeds 1 where the expert
    loses: linear below about 2 Dh tokens.

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
    """FLOPs per token of one layer's attention where every token takes this expert.

    All heads with keys of their own, no projections.
    """
    if mode is Mode.PREFILL:
        return expert.flops_per_token(context)
    before = expert.flops_per_token(context - 1) * (context - 1) if context > 1 else 0.0
    return expert.flops_per_token(context) * context - before  # what the last token added


def hard_flops(
    experts: Sequence[Expert], context: int, num_kv_heads: int, mode: Mode = Mode.PREFILL
) -> Cost:
    """FLOPs per token of one layer's attention, where each token takes its own expert.

    Every token also enters the state of each stateful expert.

    A token on a stateful expert reads a state once a query head, 2 FLOPs an element, by what
    `query_flops` makes of its queries; the rest of the expert's arithmetic is the update, which
    heads that share a key share too.
    """
    own = [_own(expert, context, mode) for expert in experts]
    shared = 0.0
    for expert, read in zip(experts, own, strict=True):
        if expert.stateful:
            saved = (
                _state(expert, expert.shape.num_heads).numel()
                - _state(expert, num_kv_heads).numel()
            )
            shared += max(flops(expert, context, mode) - read - 2 * saved, 0.0)
    return Cost(torch.tensor(own, dtype=torch.float64), shared)


def own_flops(experts: Sequence[Expert], taken: Tensor, start: int = 0) -> float:
    """Mean `own` FLOPs of the tokens that were routed, exact.

    `taken` [T, E] of those at position start + t took expert e.
    """
    T = len(taken)
    total = 0.0
    for expert, count in zip(experts, taken.double().cpu().unbind(1), strict=True):
        if expert.stateful:
            total += float(count.sum()) * _own(expert, start + T, Mode.DECODE)
            continue
        upto = [expert.flops_per_token(n) * n if n else 0.0 for n in range(start, start + T + 1)]
        total += float(count @ torch.tensor(upto, dtype=torch.float64).diff())
    return total / float(taken.sum())


def hard_bytes(
    experts: Sequence[Expert],
    context: int,
    num_kv_heads: int,
    element_size: int,
    mode: Mode = Mode.PREFILL,
) -> Cost:
    """Bytes that one layer's attention must move at least.

    In a causal pass q, k, v and the output, once. In decoding each row reads the keys and values
    that its expert sees; all rows write their own, and read and write every state.
    """
    num_heads, head_dim = experts[0].shape[:2]
    pair = 2 * num_kv_heads * head_dim * element_size  # a token's key and value
    if mode is Mode.PREFILL:
        return Cost(
            torch.zeros(len(experts), dtype=torch.float64),
            2 * num_heads * head_dim * element_size + pair,
        )
    own = [float(pair * expert.keys_read(context)) for expert in experts]
    written = 0 if all(expert.stateful for expert in experts) else pair
    states = sum(_state(expert, num_kv_heads).nbytes for expert in experts if expert.stateful)
    return Cost(torch.tensor(own, dtype=torch.float64), written + 2 * states)


def read_ratios(experts: Sequence[Expert], context: int) -> Tensor:
    """Share of the cached keys that a decoding step at `context` reads under each expert.

    float64 [E].
    """
    return torch.tensor(
        [expert.keys_read(context) / context for expert in experts], dtype=torch.float64
    )


def executed_attention(
    experts: Sequence[Expert],
    taken: Tensor,
    num_kv_heads: int,
    element_size: int,
    mode: Mode = Mode.PREFILL,
    start: int = 0,
    *,
    read: Tensor | None = None,
) -> dict[str, float]:
    """`flops` and `bytes` of attention by hard routes over those of every token on full.

    `taken`, `start` as in `own_flops`.

    FLOPs are paid by query head, so that routes by head count in `taken` as the heads do. Bytes are
    read by key head, the most that one of its query heads reads: `read` [E] counts key heads by
    that expert; default as `taken`.
    """
    context, full = start + len(taken), [FullAttention(experts[0].shape)]
    flops = (
        own_flops(experts, taken, start) + hard_flops(experts, context, num_kv_heads, mode).shared
    )
    moved, all_moved = (
        hard_bytes(made, context, num_kv_heads, element_size, mode) for made in (experts, full)
    )
    return {
        "flops": flops / own_flops(full, taken.sum(1, keepdim=True), start),
        "bytes": moved.mean(shares(taken.sum(0) if read is None else read))
        / all_moved.mean(torch.ones(1)),
    }


def shares(counts: Tensor) -> Tensor:
    """Counts [E] as fractions."""
    return counts / counts.sum()


def _own(expert: Expert, context: int, mode: Mode) -> float:
    """FLOPs of a token's own output."""
    whole = flops(expert, context, mode)
    if not expert.stateful:
        return whole
    return min(2.0 * _state(expert, expert.shape.num_heads).numel() + expert.query_flops(), whole)


def _state(expert: Expert, num_kv_heads: int) -> Tensor:
    """What a stateful expert keeps of one sequence, without memory."""
    num_heads, head_dim = expert.shape[:2]
    q = torch.empty(1, num_heads, 1, head_dim, device="meta")
    k = torch.empty(1, num_kv_heads, 1, head_dim, device="meta")
    return expert.init_state(q, k, k)
