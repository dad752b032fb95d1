"""From a posterior over routes to the route that is executed: a draw, the mean, or one expert a token by a policy.

The hard route is a decision after inference, not a latent.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.config import require
from bayes_router.routing.posterior import posterior_mean, probability_of_largest
from bayes_router.types import RoutingMode


class Policy(Protocol):
    """Chooses one expert a token."""

    def __call__(self, concentration: Tensor) -> Tensor:
        """Concentration [..., E] -> hard_choice int64 [...]."""
        ...


@dataclass(frozen=True)
class Argmax:
    """The expert of largest posterior mean."""

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        return concentration.argmax(-1)


@dataclass(frozen=True)
class Conservative:
    """Argmax, but a token that is unsure takes the stronger expert.

    Where the posterior probability that the argmax is the largest weight falls below `threshold`, the token takes the
    costliest expert whose posterior mean is at least `least_mean` (cost stands for strength).
    """

    cost_ratio: tuple[float, ...]
    threshold: float = 0.7
    least_mean: float = 0.05

    def __post_init__(self) -> None:
        """Check the fields."""
        require(0 <= self.threshold <= 1, "policy.threshold", "a probability", self.threshold)
        require(0 <= self.least_mean <= 1, "policy.least_mean", "a probability", self.least_mean)

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        best = concentration.argmax(-1)
        sure = probability_of_largest(concentration, best) >= self.threshold
        cost = concentration.new_tensor(self.cost_ratio)
        plausible = posterior_mean(concentration) >= self.least_mean
        strongest = torch.where(plausible, cost, -1.0).argmax(-1)
        return torch.where(sure, best, strongest)


@dataclass(frozen=True)
class Budget:
    """argmax of log posterior mean - price x cost: one trained model, many budgets."""

    cost_ratio: tuple[float, ...]
    price: float = 0.0

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        cost = concentration.new_tensor(self.cost_ratio)
        return (posterior_mean(concentration).log() - self.price * cost).argmax(-1)


def execute(posterior: Dirichlet, mode: RoutingMode, policy: Policy) -> Tensor:
    """The route of every token: weights [..., E] for SAMPLE and MEAN, choices int64 [...] for HARD."""
    if mode is RoutingMode.SAMPLE:
        return posterior.rsample()
    if mode is RoutingMode.MEAN:
        return posterior_mean(posterior.concentration)
    return policy(posterior.concentration)
