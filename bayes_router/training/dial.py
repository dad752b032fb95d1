"""The compute dial: one fitted model, many budgets.

The price of a policy is set on held-out text so that the executed routes cost what a budget says.
Routes interact: a route changed in one layer moves the hidden states, hence the posteriors, of all
later ones. So every cost here is that of a pass that was executed, not one projected from stored
posteriors.
"""

import itertools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayes_router.checks import not_negative, require
from bayes_router.data.tokens import TokenSource, Windowed
from bayes_router.routing.policy import Budget, Policy, at_price
from bayes_router.training.executed import (
    CountedCost,
    Executed,
    ExecutedPass,
    Routed,
    cost_of,
    execute,
)
from bayes_router.types import RoutingMode

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.005
"""How far from a budget an executed cost may lie, full attention = 1."""
GRID = (0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Budgets of the usual table, full attention = 1."""
RESOLUTION = 1e-5
"""Prices closer than this, relative to theirs where that is above 1, count as one."""
STEEPEST = 1e4
"""Nats per unit of cost: at this price every token takes the cheapest expert, at minus this the
costliest."""
HALVINGS = 60
"""Of the prices between plus and minus the steepest, on posteriors that are held: to beyond what
float32 tells apart."""


class BudgetUnreachable(ValueError):
    """No price realises the budget; `nearest` is the reading that comes closest."""

    def __init__(self, message: str, nearest: Executed | None = None):
        super().__init__(message)
        self.nearest = nearest


class _End(NamedTuple):
    """A price that was not executed, for what it costs is known."""

    price: float
    cost: float


class Dial:
    """Sets the price of a policy so that the executed routes cost a budget.

    Keeps every pass, so a curve costs few.

    Args:
        model: the fitted model, or a patched one.
        source: held-out data.
        cost_ratio: [E], or [L, E] where layers differ, full = 1; or a function that counts the cost
            of executed routes.
        context: tokens of a window.
        batch_size: windows at a time.
        limit: read at most this many tokens in each pass.
        policy: price -> policy; argmax with a price (`Budget`) by default, at the costs [E].
        experts: their names, for the columns of a table; default the model's.
    """

    def __init__(
        self,
        model: Routed,
        source: Windowed,
        cost_ratio: Tensor | Sequence[float] | CountedCost,
        *,
        context: int,
        batch_size: int,
        limit: int | None = None,
        policy: Callable[[float], Policy] | None = None,
        experts: Sequence[str] | None = None,
    ):
        self.model, self.source = model, source
        self.cost = (
            cost_ratio if callable(cost_ratio) else torch.as_tensor(cost_ratio, dtype=torch.float64)
        )
        self.context, self.batch_size, self.limit = context, batch_size, limit
        if policy is None:
            one = isinstance(self.cost, Tensor) and self.cost.dim() == 1
            require(
                one,
                "policy",
                "one, where layers differ in what an expert costs",
                None,
                "give at_price(name, cost_ratio)",
            )
            policy = at_price("argmax", self.cost.tolist())  # type: ignore[union-attr]
        self.policy = policy
        self.experts = experts
        self.readings: dict[float, Executed] = {}
        # others take longer than a pass on posteriors that are held
        self._foresees = isinstance(policy(0.0), Budget)
        self._last: ExecutedPass | None = None

    def read(self, price: float) -> Executed:
        """What the policy at `price` does, executed."""
        if price not in self.readings:
            windows = self.source.windows(self.context, self.batch_size, self.limit)
            self._last = execute(
                self.model, windows, self.cost, RoutingMode.HARD, self.policy(price), price
            )
            self.readings[price] = self._last.reading
        return self.readings[price]

    def solve(
        self, budget: float, tolerance: float = TOLERANCE, jump: float | None = None
    ) -> Executed:
        """The reading whose cost is within `tolerance` of `budget`.

        The cost is a step function of the price, and need not be monotone: the search keeps one
        price that costs at least the budget and a higher one that costs less. Between them, the
        next is in turn the one that would do were the posteriors those of the last pass, the one
        just below (a jump is found at once), and the middle.

        Args:
            budget: full attention = 1.
            tolerance: how far from it the cost may lie.
            jump: how far the nearest cost may lie where the budget is in a jump: many tokens share
                one posterior, as under a collapsed guide, and change expert at one price. Default
                `tolerance`.

        Raises:
            BudgetUnreachable: (a ValueError) the budget is outside the costs of the experts, or in
                a jump.
        """
        number = isinstance(budget, Real) and not isinstance(budget, bool)
        require(number, "budget", "a number", budget)
        for name, value in (("tolerance", tolerance), ("jump", jump)):
            if value is not None:
                not_negative(name, value)
        least, most = self.ends()
        if not least - tolerance <= budget <= most + tolerance:
            raise BudgetUnreachable(
                f"budget: expected a cost from {least:.3f} (every token on the cheapest expert) to "
                f"{most:.3f} (on the "
                f"costliest); got {budget:g}; choose one in this range"
            )
        # at an end, the price that just leads there
        margin = max(tolerance / 2, torch.finfo(torch.float32).eps)
        aim = min(max(budget, least + margin), most - margin)
        self.read(0.0)
        for turn in itertools.count():
            nearest = min(self.readings.values(), key=lambda reading: abs(reading.cost - budget))
            if abs(nearest.cost - budget) <= tolerance:
                return nearest
            low, high = self._around(aim)
            near = RESOLUTION * max(1.0, abs(low.price))
            if high.price - low.price <= near:
                break
            self.read(self._next(low, high, aim, near, turn))
        if abs(nearest.cost - budget) <= (tolerance if jump is None else jump):
            return nearest
        raise BudgetUnreachable(
            f"budget: expected a cost that some price realises within "
            f"{max(tolerance, jump or 0.0):g}; got {budget:g}, in a "
            f"jump: at price {low.price:.4g} the executed cost goes from {low.cost:.3f} to "
            f"{high.cost:.3f}, for many tokens "
            f"share one posterior; choose {nearest.cost:.3f}, another cost outside the jump, or a "
            f"larger tolerance",
            nearest,
        )

    def ends(self) -> tuple[float, float]:
        """The least and the most that routes can cost.

        Every token on the cheapest expert of its layer, or the costliest.
        """
        if isinstance(self.cost, Tensor):
            return float(self.cost.amin(-1).mean()), float(self.cost.amax(-1).mean())
        self.read(0.0)
        assert self._last is not None
        route, num_experts = self._last.route, self._last.concentration.shape[-1]
        found = [self.cost(torch.full_like(route, index)) for index in range(num_experts)]
        return min(found), max(found)

    def _around(self, aim: float) -> tuple[Executed | _End, Executed | _End]:
        """Neighbouring prices, the first costing at least `aim`, the second less."""
        least, most = self.ends()
        known: list[Executed | _End] = [
            _End(-STEEPEST, most),
            *(self.readings[price] for price in sorted(self.readings)),
        ]
        known.append(_End(STEEPEST, least))
        return next(
            (low, high) for low, high in itertools.pairwise(known) if low.cost >= aim > high.cost
        )

    def _next(
        self, low: Executed | _End, high: Executed | _End, aim: float, near: float, turn: int
    ) -> float:
        """A price between two."""
        ends = isinstance(low, _End), isinstance(high, _End)
        if self._foresees and turn % 3 < 2:
            tried = self._foreseen(aim) - (0.9 * near if turn % 3 else 0.0)
        elif any(ends):  # away from what is known, twice as far each time
            step = 2.0 ** min(turn, 12)
            tried = high.price - step if ends[0] else low.price + step
        else:
            share = (low.cost - aim) / (low.cost - high.cost)
            tried = (
                low.price + min(max(share, 0.05), 0.95) * (high.price - low.price)
                if turn % 3 < 2
                else torch.inf
            )
        return tried if low.price < tried < high.price else (low.price + high.price) / 2

    def _foreseen(self, aim: float) -> float:
        """The lowest price at which the last pass's posteriors cost at most `aim`, by bisection."""
        assert self._last is not None
        concentration, shares = self._last.concentration, self._last.concentration.shape[-1]

        def spent(price: float) -> float:
            route = self.policy(price)(concentration)
            if not isinstance(self.cost, Tensor):
                return self.cost(route)
            load = torch.stack(
                [(route == index).double().mean((1, 2, 3)) for index in range(shares)], -1
            )
            return cost_of(route, load.cpu(), self.cost)

        low, high = -STEEPEST, STEEPEST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) > aim else (low, middle)
        return high

    def curve(
        self, budgets: Sequence[float] = GRID, tolerance: float = TOLERANCE
    ) -> "pd.DataFrame":
        """Held-out nll against budget.

        One row for each budget that lies between the cheapest and the costliest expert.

        Columns: budget, cost (executed), price, nll_hard (nats per token), `load NAME` (mean over
        layers), and met: False where the budget lies in a jump and the row is the nearest cost that
        a price realises.
        """
        import pandas as pd

        least, most = self.ends()
        rows = []
        for budget in budgets:
            if not least - tolerance <= budget <= most + tolerance:
                continue
            try:
                reading, met = self.solve(budget, tolerance), True
            except BudgetUnreachable as error:
                assert error.nearest is not None
                reading, met = error.nearest, False
            rows.append({"budget": budget, "met": met, **self.row(reading)})
        return pd.DataFrame(rows)

    def row(self, reading: Executed) -> dict[str, float]:
        """A reading as flat columns."""
        names = self.experts or getattr(self.model, "config").experts  # noqa: B009
        load = zip(names, reading.load.mean(0).tolist(), strict=True)
        row = {"cost": reading.cost, "price": reading.price, "nll_hard": reading.nll}
        return row | {f"load {name}": share for name, share in load}


def solve_price(
    model: Routed,
    source: TokenSource,
    cost_ratio: Tensor | Sequence[float],
    budget: float,
    *,
    context: int,
    batch_size: int,
    limit: int | None = None,
    tolerance: float = TOLERANCE,
    policy: Callable[[float], Policy] | None = None,
) -> Executed:
    """The price at which the executed routes of `model` cost `budget` on held-out text.

    And what they did there.

    `Budget(cost_ratio, reading.price)` is then the policy to deploy. Arguments and errors as for
    `Dial` and `Dial.solve`.
    """
    dial = Dial(
        model,
        source,
        cost_ratio,
        context=context,
        batch_size=batch_size,
        limit=limit,
        policy=policy,
    )
    return dial.solve(budget, tolerance)
