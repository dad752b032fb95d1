"""What holds the cost of executed routes where a fit wants it.

The price of the prior, moved as costs come in.
"""

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet

from bayes_router.checks import require
from bayes_router.routing.controller import MetaController
from bayes_router.routing.policy import tilted_by

LEAST, MOST = 1e-3, 1e6
"""Prices of the prior, nats per unit of cost."""


class Asked(NamedTuple):
    """What a step of the fit is run at."""

    price: float  # of the prior's tilt
    # by which the posterior is moved, as `Budget` moves it; both in nats per unit of cost
    dial: float = 0.0


class Pressure(Protocol):
    """Prices, step by step."""

    def ask(self, progress: float, random: np.random.Generator) -> Asked:
        """For the step at hand; `progress` of the fit from 0 to 1."""

    def see(self, cost: float) -> None:
        """Take in the executed cost of that step."""


class OneBudget:
    """An integral and a proportional step on the log of one price.

    log price += I e, and for the step at hand + P e, with e = cost - target; the target falls
    linearly from 1, where a fit starts, to the budget over the first `FALL` of it. A Lagrange
    multiplier: the prior stays a prior of one price a step.
    """

    INTEGRAL, PROPORTIONAL, FALL = 0.2, 3.0, 0.4

    def __init__(self, budget: float, price: float):
        self.budget, self.log_price, self.error, self.target = (
            budget,
            math.log(max(price, LEAST)),
            0.0,
            1.0,
        )

    def ask(self, progress: float, random: np.random.Generator) -> Asked:
        """See `Pressure.ask`."""
        self.target = 1 - (1 - self.budget) * min(progress / self.FALL, 1.0)
        return Asked(
            min(max(math.exp(self.log_price + self.PROPORTIONAL * self.error), LEAST), MOST)
        )

    def see(self, cost: float) -> None:
        """See `Pressure.see`."""
        self.error = cost - self.target
        moved = self.log_price + self.INTEGRAL * self.error
        self.log_price = min(max(moved, math.log(LEAST)), math.log(MOST))


class BudgetRange:
    """A budget drawn anew each step, so that one fit serves them all.

    A budget is a share f of what may be spent beyond the cheapest expert: cost = least + f (most -
    least). f is drawn log-uniformly; its lower end falls from `START` to what is asked over the
    first `FALL` of the fit. Every step moves the posterior by a dial that grows as f falls, SLOPE
    ln(MIDDLE / f) on the log odds of the costliest expert against the cheapest: controllers learn
    one order of tokens and units, by what attention is worth there, and the budget says how far
    down that order attention is spent. That is what `Budget` does when it is executed.

    The price that makes the executed share f is learned at `KNOTS` values of log f: an integral
    step at the two nearest, a little of it everywhere, and a proportional one.

    Args:
        low: smallest budget.
        high: largest.
        least: cost of every token on the cheapest expert.
        most: on the costliest.
        price: where prices start, at f = MIDDLE.
    """

    SLOPE, MIDDLE, START, FALL, KNOTS = 2.6, 0.15, 0.8, 0.35, 12
    INTEGRAL, SPREAD = 0.3, 0.05
    FLOOR = 0.01  # shares nearer than this are not told apart

    def __init__(self, low: float, high: float, least: float, most: float, price: float):
        self.least, self.span = least, max(most - least, 1e-6)
        ends = ((b - least) / self.span for b in (low, high))
        self.low, self.high = (min(max(share, self.FLOOR), 1.0) for share in ends)
        bottom, top = math.log(self.low), math.log(max(self.high, self.START))
        self.knots = torch.linspace(
            bottom, max(top, bottom + 1e-3), self.KNOTS, dtype=torch.float64
        )
        start = math.log(max(price, LEAST))
        self.log_price = (start - (self.knots - math.log(self.MIDDLE))).clamp(
            math.log(LEAST), math.log(MOST)
        )
        self.error = torch.zeros_like(self.knots)
        self.share = 1.0

    def _weights(self, share: float) -> Tensor:
        """How much each knot has to do with a share; they sum to 1."""
        near = (
            1 - (math.log(share) - self.knots).abs() / (self.knots[1] - self.knots[0])
        ).clamp_min(0)
        return near / near.sum()

    def dial(self, share: float) -> float:
        """By which the posterior is moved for a share."""
        return self.SLOPE * math.log(self.MIDDLE / share) / self.span

    def ask(self, progress: float, random: np.random.Generator) -> Asked:
        """See `Pressure.ask`."""
        done, start = min(progress / self.FALL, 1.0), max(self.START, self.high)
        low = math.exp(math.log(start) + (math.log(self.low) - math.log(start)) * done)
        high = max(low, math.exp(math.log(start) + (math.log(self.high) - math.log(start)) * done))
        self.share = math.exp(random.uniform(math.log(low), math.log(high)))
        weights = self._weights(self.share)
        log_price = float(((self.log_price + self.error) * weights).sum())
        return Asked(min(max(math.exp(log_price), LEAST), MOST), self.dial(self.share))

    def see(self, cost: float) -> None:
        """See `Pressure.see`."""
        share, weights = (cost - self.least) / self.span, self._weights(self.share)
        error = math.log((max(share, 0.0) + self.FLOOR) / (self.share + self.FLOOR))
        self.log_price += (self.INTEGRAL * weights + self.SPREAD) * error
        self.log_price.clamp_(math.log(LEAST), math.log(MOST))
        self.error = (1 - weights) * self.error + weights * error


class Dialled(nn.Module):
    """The posteriors of a controller with their means moved by a dial.

    They move in the order that `Budget` executes.

    The least concentration of the controller is added again after the move: where an expert is left
    with next to none, the KL to any prior would outgrow the rest of the loss.

    Args:
        controller: whose posteriors.
        layer_cost: of the experts in each layer, [L, E] or [L, R, E].
    """

    layer_cost: Tensor
    moved_by: Tensor  # [], the dial

    def __init__(self, controller: MetaController, layer_cost: Tensor):
        super().__init__()
        self.controller, self._dial = controller, 0.0
        self.register_buffer("layer_cost", layer_cost, persistent=False)
        self.register_buffer("moved_by", layer_cost.new_zeros(()), persistent=False)

    @property
    def dial(self) -> float:
        """Nats per unit of cost; it moves inside a tensor, where a captured CUDA graph reads it."""
        return self._dial

    @dial.setter
    def dial(self, dial: float) -> None:
        self._dial = dial
        self.moved_by.fill_(dial)

    def posterior(self, layer: int, hidden: Tensor) -> Dirichlet:
        """See `MetaController.posterior`."""
        q = self.controller.posterior(layer, hidden)
        if self.dial == 0:
            return q
        tilt = (self.moved_by * self.layer_cost[layer]).to(q.concentration)
        moved = tilted_by(q.concentration, tilt) + self.controller.floor
        return Dirichlet(moved, validate_args=False)


def pressure_for(
    budget: float | tuple[float, float] | None, layer_cost: Tensor, price: float
) -> OneBudget | BudgetRange | None:
    """What holds a budget, or a range of them, over experts that cost `layer_cost` [..., E].

    None without one.
    """
    if budget is None:
        return None
    if isinstance(budget, float | int):
        return OneBudget(budget, price)
    least, most = (
        float(ends.double().mean()) for ends in (layer_cost.amin(-1), layer_cost.amax(-1))
    )
    require(
        budget[0] > least,
        "budget",
        f"a range above {least:.3f}, every token on the cheapest expert",
        budget,
    )
    return BudgetRange(*budget, least, most, price)
