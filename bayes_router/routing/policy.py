"""From a posterior over routes to the route that is executed: a draw, the mean, or one expert a token by a policy.

The hard route is a decision after inference, not a latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import require
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


def like(values: Sequence[float], x: Tensor) -> Tensor:
    """`values` [E] in the dtype and on the device of x. They are kept there: a copy from the host waits for a GPU."""
    return _kept(tuple(values), x.dtype, x.device)


@lru_cache(maxsize=64)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made there could not be used elsewhere
        return torch.tensor(values, dtype=dtype, device=device)


def priced(concentration: Tensor, cost_ratio: Sequence[float], price: float) -> Tensor:
    """The concentration whose mean is proportional to mean x exp(-price x cost), at the same total; [..., E].

    `price` in nats per unit of cost ratio: what a token must be surer of the dearer expert to take it. 0 changes nothing.
    """
    if price == 0:
        return concentration
    share = (concentration.log() - like([price * cost for cost in cost_ratio], concentration)).softmax(-1)
    least = torch.finfo(concentration.dtype).tiny  # an underflowed concentration is no concentration
    return (share * concentration.sum(-1, keepdim=True)).clamp_min(least)


@dataclass(frozen=True)
class Conservative:
    """Argmax, but a token that is unsure takes the stronger expert.

    Where the posterior probability that the argmax is the largest weight falls below `threshold`, the token takes the
    costliest expert whose posterior mean is at least `least_mean` (cost stands for strength).

    `price` moves the posterior first, see `priced`: so that a budget can be met, as `Budget` meets one by argmax.
    """

    cost_ratio: tuple[float, ...]
    threshold: float = 0.7
    least_mean: float = 0.05
    price: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require(0 <= self.threshold <= 1, "policy.threshold", "a probability", self.threshold)
        require(0 <= self.least_mean <= 1, "policy.least_mean", "a probability", self.least_mean)

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        concentration = priced(concentration, self.cost_ratio, self.price)
        best = concentration.argmax(-1)
        sure = probability_of_largest(concentration, best) >= self.threshold
        cost = like(self.cost_ratio, concentration)
        plausible = posterior_mean(concentration) >= self.least_mean
        strongest = torch.where(plausible, cost, -1.0).argmax(-1)
        return torch.where(sure, best, strongest)


@dataclass(frozen=True)
class Budget:
    """argmax of log posterior mean - price x cost: one trained model, many budgets.

    `price` in nats per unit of cost ratio. 0 is argmax; a negative price spends more than that, up to every token on the
    costliest expert.
    """

    cost_ratio: tuple[float, ...]
    price: float = 0.0

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`. The log of the total concentration is the same for all experts, and left out."""
        paid = like([self.price * cost for cost in self.cost_ratio], concentration)
        return (concentration.log() - paid).argmax(-1)


class PolicyName(Enum):
    """The policies by the names that the command line knows them by."""

    ARGMAX = "argmax"
    CONSERVATIVE = "conservative"

    def at_price(self, cost_ratio: Sequence[float], threshold: float = 0.7) -> Callable[[float], Policy]:
        """Price -> policy: the family that a budget is met within."""
        costs = tuple(map(float, cost_ratio))
        if self is PolicyName.ARGMAX:
            return lambda price: Budget(costs, price)
        return lambda price: Conservative(costs, threshold, price=price)


def execute(posterior: Dirichlet, mode: RoutingMode, policy: Policy) -> Tensor:
    """The route of every token: weights [..., E] for SAMPLE and MEAN, choices int64 [...] for HARD."""
    if mode is RoutingMode.SAMPLE:
        return posterior.rsample()
    if mode is RoutingMode.MEAN:
        return posterior_mean(posterior.concentration)
    return policy(posterior.concentration)
