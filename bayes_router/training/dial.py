"""The compute dial: one fitted model, many budgets.

The price of a policy is set on held-out text so that the executed routes cost what a budget says.
Routes interact: a route changed in one layer moves the hidden states, hence the posteriors, of all later ones. So every
cost here is that of a pass that was executed, not one projected from stored posteriors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.checks import require
from bayes_router.data.tokens import TokenSource
from bayes_router.routing.policy import Argmax, Policy, at_price
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import IGNORED, RoutingMode

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.005
GRID = (0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Budgets of the usual table, full attention = 1."""
RESOLUTION = 1e-4
"""Prices closer than this, relative to theirs where that is above 1, count as one."""
FARTHEST = 1e5


class BudgetUnreachable(ValueError):
    """No price realises the budget; `nearest` is the reading that comes closest."""

    def __init__(self, message: str, nearest: "Reading | None" = None):
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class Reading:
    """One executed pass over held-out text."""

    price: float  # nats per unit of cost ratio
    cost: float  # cost ratio of the executed routes, mean over tokens and layers
    load: Tensor  # [L, E] float64, share of the tokens (of the weight, where routes are soft) on each expert
    window_nll: Tensor  # [windows] float64, sum over the scored tokens of each window, nats
    window_scored: Tensor  # [windows] float64, number of scored tokens

    @property
    def nll(self) -> float:
        """Nats per scored token."""
        return float(self.window_nll.sum() / self.window_scored.sum())

    def nll_above(self, other: "Reading") -> tuple[float, float]:
        """How many nats per token this reading lies above `other` on the same windows, and the standard error (paired)."""
        difference = (self.window_nll - other.window_nll) * len(self.window_nll) / self.window_scored.sum()
        return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


@torch.no_grad()
def read_routes(
    model: RoutedLanguageModel,
    source: TokenSource,
    cost_ratio: Tensor,
    *,
    context: int,
    batch_size: int,
    limit: int | None = None,
    mode: RoutingMode = RoutingMode.HARD,
    policy: Policy | None = None,
    price: float = 0.0,
    seed: int = 0,
) -> Reading:
    """Execute the routes of `model` on held-out windows: their cost, load and loss.

    Args:
        model: the fitted model; its policy and its mode (train, eval) are as before afterwards.
        source: held-out data.
        cost_ratio: [E], full = 1.
        context: tokens of a window.
        batch_size: windows at a time.
        limit: read at most this many tokens.
        mode: SAMPLE, MEAN or HARD.
        policy: of HARD; argmax by default.
        price: noted in the reading.
        seed: of the draws of SAMPLE; the generator of the caller is left as it was.
    """
    device, num_experts = next(model.parameters()).device, len(model.config.experts)
    require(
        cost_ratio.shape == (num_experts,), "cost_ratio", f"one number for each of {num_experts} experts", cost_ratio.tolist()
    )
    was_training, usual = model.training, model.policy
    model.eval()
    model.policy = policy or Argmax()
    loads, nlls, scored = [], [], []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for batch in source.windows(context, batch_size, limit):
                out, targets = model(batch.tokens.to(device), mode), batch.targets.to(device)
                weights = out.route if out.route.is_floating_point() else F.one_hot(out.route, num_experts)  # [L, B, T, E]
                loads.append(weights.double().mean(2))  # [L, B, E]
                nll = F.cross_entropy(out.logits.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")
                nlls.append(nll.double().sum(1))
                scored.append((targets != IGNORED).sum(1).double())
    finally:
        model.train(was_training)
        model.policy = usual
    load = torch.cat(loads, 1).mean(1).cpu()
    cost = float((load @ cost_ratio.to("cpu", torch.float64)).mean())
    return Reading(price, cost, load, torch.cat(nlls).cpu(), torch.cat(scored).cpu())


class Dial:
    """Sets the price of a policy so that the executed routes cost a budget; keeps every pass, so a curve costs few.

    Args:
        model: the fitted model.
        source: held-out data.
        cost_ratio: [E], full = 1.
        context: tokens of a window.
        batch_size: windows at a time.
        limit: read at most this many tokens in each pass.
        policy: price -> policy; argmax with a price (`Budget`) by default.
    """

    def __init__(
        self,
        model: RoutedLanguageModel,
        source: TokenSource,
        cost_ratio: Tensor | Sequence[float],
        *,
        context: int,
        batch_size: int,
        limit: int | None = None,
        policy: Callable[[float], Policy] | None = None,
    ):
        self.model, self.source = model, source
        self.cost_ratio = torch.as_tensor(cost_ratio, dtype=torch.float64)
        self.context, self.batch_size, self.limit = context, batch_size, limit
        self.policy = policy or at_price("argmax", self.cost_ratio.tolist())
        self.readings: dict[float, Reading] = {}

    def read(self, price: float) -> Reading:
        """What the policy at `price` does, executed."""
        if price not in self.readings:
            self.readings[price] = read_routes(
                self.model,
                self.source,
                self.cost_ratio,
                context=self.context,
                batch_size=self.batch_size,
                limit=self.limit,
                policy=self.policy(price),
                price=price,
            )
        return self.readings[price]

    def solve(self, budget: float, tolerance: float = TOLERANCE) -> Reading:
        """The reading whose cost is within `tolerance` of `budget`.

        Bisection on the price, shortened by interpolating the cost unless that moves the same end twice. The cost is a step
        function of the price, and need not be monotone; the search keeps one price that costs at least the budget and a
        higher one that costs less.

        Raises:
            BudgetUnreachable: (a ValueError) the budget is outside the costs of the experts, or in a jump: many tokens
                share one posterior, as under a collapsed guide, and change expert at one price.
        """
        least, most = float(self.cost_ratio.min()), float(self.cost_ratio.max())
        if not least - tolerance <= budget <= most + tolerance:
            raise BudgetUnreachable(
                f"budget: expected a cost from {least:.3f} (every token on the cheapest expert) to {most:.3f} (on the "
                f"costliest); got {budget:g}; choose one in this range"
            )
        low, high = self._bracket(budget, tolerance)
        moved, same_end = "", 0
        while True:
            nearest = min(low, high, key=lambda reading: abs(reading.cost - budget))
            if abs(nearest.cost - budget) <= tolerance:
                return nearest
            if high.price - low.price < RESOLUTION * max(1.0, abs(low.price)):
                break
            share = (low.cost - budget) / (low.cost - high.cost) if same_end < 2 else 0.5
            middle = self.read(low.price + min(max(share, 0.05), 0.95) * (high.price - low.price))
            end = "low" if middle.cost >= budget else "high"
            moved, same_end = end, same_end + 1 if end == moved else 1
            low, high = (middle, high) if end == "low" else (low, middle)
        raise BudgetUnreachable(
            f"budget: expected a cost that some price realises within {tolerance:g}; got {budget:g}, in a jump: at price "
            f"{low.price:.4g} the executed cost goes from {low.cost:.3f} to {high.cost:.3f}, for many tokens share one "
            f"posterior; choose {nearest.cost:.3f}, or another cost outside the jump",
            nearest,
        )

    def _bracket(self, budget: float, tolerance: float) -> tuple[Reading, Reading]:
        """Neighbouring readings, the first costing at least `budget`, the second (at a higher price) less, or one twice."""
        known = sorted({0.0: self.read(0.0), **self.readings}.items())
        for reading in self.readings.values():
            if abs(reading.cost - budget) <= tolerance:
                return reading, reading
        for (_, low), (_, high) in zip(known[:-1], known[1:], strict=True):
            if low.cost >= budget > high.cost:
                return low, high
        up = known[0][1].cost >= budget  # all readings cost at least the budget: raise the price, else lower it
        end, reach = known[-1 if up else 0][1], 1.0
        while reach <= FARTHEST:
            further = self.read(end.price + (reach if up else -reach))
            if abs(further.cost - budget) <= tolerance:
                return further, further
            if up and further.cost < budget:
                return end, further
            if not up and further.cost >= budget:
                return further, end
            end, reach = further, 2 * reach
        raise BudgetUnreachable(
            f"budget: expected a cost that a price of at most {FARTHEST:g} nats realises; got {budget:g}; the nearest is "
            f"{end.cost:.3f}",
            end,
        )

    def curve(self, budgets: Sequence[float] = GRID, tolerance: float = TOLERANCE) -> "pd.DataFrame":
        """Held-out nll against budget: one row for each budget that lies between the cheapest and the costliest expert.

        Columns: budget, cost (executed), price, nll_hard (nats per token), `load NAME` (mean over layers), and met: False
        where the budget lies in a jump and the row is the nearest cost that a price realises.
        """
        import pandas as pd

        least, most = float(self.cost_ratio.min()) - tolerance, float(self.cost_ratio.max()) + tolerance
        rows = []
        for budget in budgets:
            if not least <= budget <= most:
                continue
            try:
                reading, met = self.solve(budget, tolerance), True
            except BudgetUnreachable as error:
                assert error.nearest is not None
                reading, met = error.nearest, False
            rows.append({"budget": budget, "met": met, **self.row(reading)})
        return pd.DataFrame(rows)

    def row(self, reading: Reading) -> dict[str, float]:
        """A reading as flat columns."""
        load = zip(self.model.config.experts, reading.load.mean(0).tolist(), strict=True)
        row = {"cost": reading.cost, "price": reading.price, "nll_hard": reading.nll}
        return row | {f"load {name}": share for name, share in load}


def solve_price(
    model: RoutedLanguageModel,
    source: TokenSource,
    cost_ratio: Tensor | Sequence[float],
    budget: float,
    *,
    context: int,
    batch_size: int,
    limit: int | None = None,
    tolerance: float = TOLERANCE,
    policy: Callable[[float], Policy] | None = None,
) -> Reading:
    """The price at which the executed routes of `model` cost `budget` on held-out text, and what they did there.

    `Budget(cost_ratio, reading.price)` is then the policy to deploy. Arguments and errors as for `Dial` and `Dial.solve`.
    """
    dial = Dial(model, source, cost_ratio, context=context, batch_size=batch_size, limit=limit, policy=policy)
    return dial.solve(budget, tolerance)
