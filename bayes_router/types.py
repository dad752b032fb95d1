"""Names that every floor shares: enums for choices, the shapes of results, the names of Pyro sites.

Letters, here and everywhere: B batch, T tokens, L layers, D d_model, H query heads, Hkv key and value heads, Dh head_dim,
E experts, V vocabulary, W window (visible keys, self included).

torch is imported for the type checker alone: settings and the command line read this file before they need it.
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
"""(layer, hidden [B, T, D]) -> weights [B, T, E], hard choices int64 [B, T], or the one expert that all tokens take."""


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
    """Parts of the objective, nats per token. `elbo` carries the KL at weight 1, whatever weight training used."""

    nll: Tensor  # []
    kl: Tensor  # [], summed over layers
    elbo: Tensor  # [] = -(nll + kl)


class RoutingOutput(NamedTuple):
    """A forward pass of a routed model."""

    logits: Tensor  # [B, T, V]
    concentration: Tensor  # [L, B, T, E] of the posterior, float32
    route: Tensor  # as executed: weights [L, B, T, E] or choices int64 [L, B, T]
