"""Names that every floor shares: enums for choices, the shapes of results, the names of Pyro sites.

Letters, here and everywhere: B batch, T tokens, L layers, D d_model, H query heads, Hkv key and
value heads, Dh head_dim, R routing units of a layer (1, Hkv or H), E experts, V vocabulary, W
window (visible keys, self included).

torch is imported for the type checker alone: settings and the command line read this file before
they need it.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

IGNORED = -100
"""A target that is not scored."""

Route: TypeAlias = "Callable[[int, Tensor], Tensor | int]"
"""(layer, hidden [B, T, D]) -> weights [B, T, R, E], hard choices int64 [B, T, R], or the one
expert that all tokens take.

R is the number of routing units, or 1: one route for all heads.
"""


class RouteBy(Enum):
    """What chooses an expert: the routing unit of a layer."""

    LAYER = "layer"  # all heads of a token together
    KV_HEAD = "kv_head"  # each key and value head, with the query heads that share it
    HEAD = "head"  # each query head

    def units(self, num_heads: int, num_kv_heads: int) -> int:
        """R, routing units of a layer; each is num_heads / R neighbouring query heads."""
        return {RouteBy.LAYER: 1, RouteBy.KV_HEAD: num_kv_heads, RouteBy.HEAD: num_heads}[self]


class RoutingMode(Enum):
    """How a route is executed."""

    SAMPLE = "sample"  # one draw from the posterior weighs the experts: training
    MEAN = "mean"  # the posterior mean weighs the experts
    HARD = "hard"  # one expert a token, decided by a policy


class CostModel(Enum):
    """What a mechanism costs relative to full attention (full = 1)."""

    PAPER = "paper"  # arXiv 2605.28384: full 1.0, linear 0.15, local 0.30
    FLOPS = "flops"  # analytic, by T, W and Dh
    LATENCY = "latency"  # measured on this device


class LossTerms(NamedTuple):
    """Parts of the objective, nats per token.

    `elbo` carries the KL at weight 1, whatever weight training used.
    """

    nll: Tensor  # []
    kl: Tensor  # [], summed over layers and units
    elbo: Tensor  # [] = -(nll + kl)


class RoutingOutput(NamedTuple):
    """A forward pass of a routed model."""

    logits: Tensor  # [B, T, V]
    concentration: Tensor  # [L, B, T, R, E] of the posterior, float32
    route: Tensor  # as executed: weights [L, B, T, R, E] or choices int64 [L, B, T, R]
