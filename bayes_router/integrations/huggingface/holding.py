"""A budget that is held as text goes by: the price moves from pass to pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.integrations.huggingface.language import RoutedLanguage
from bayes_router.routing.cost import counted
from bayes_router.routing.policy import Argmax, Budget
from bayes_router.training.dial import HALVINGS, STEEPEST

HORIZON = 8192
"""Tokens over which what was spent too much, or too little, is made up for."""
LEAST_SEEN = 256
"""Tokens on which a price is set."""


class Holding:
    """What passes have cost so far, and the price that holds a budget over them.

    After each pass (single tokens are gathered up to `LEAST_SEEN`) the price is set at which the
    posteriors of that pass would have cost what is left: the budget, less what was spent beyond it
    so far over `HORIZON` tokens. A pass knows the passes before it and nothing of its own text, so
    that no token sees what comes after it. Costs are those of `set_budget`.

    Args:
        router: the patched model.
        budget: full attention = 1.
    """

    def __init__(self, router: RoutedLanguage, budget: float):
        self.router, self.budget, self.ratio = router, budget, tuple(router.cost_ratio.tolist())
        self.count = counted(router.layer_cost)
        self.spent, self.tokens, self.waiting = 0.0, 0, list[Tensor]()

    @property
    def cost(self) -> float:
        """Of all passes so far, a token; 0 before the first."""
        return self.spent / max(self.tokens, 1)

    def __repr__(self) -> str:
        return f"Holding(budget {self.budget:g}, cost {self.cost:.4f}, {self.tokens:,} tokens)"

    def see(self) -> None:
        """Take in the pass that was, and move the price for the next."""
        last = self.router.last.detached()
        if last.on_full or len(last.concentration) < len(self.router.layers):
            return  # a text too short to be routed, or one whose route was forced
        if any(route.is_floating_point() for route in last.executed.values()):
            return  # a draw or a mixture, which no price moves
        layers = sorted(last.concentration)
        routes = torch.stack([last.tokens(i, last.executed[i])[0] for i in layers])  # [L, n, R]
        self.spent += self.count(routes) * routes.shape[1]
        self.tokens += routes.shape[1]
        self.waiting.append(torch.stack([last.tokens(i, last.concentration[i])[0] for i in layers]))
        if (seen := sum(part.shape[1] for part in self.waiting)) >= LEAST_SEEN:
            beyond = self.spent - self.budget * self.tokens
            wanted = self.budget - beyond / max(HORIZON, seen)
            self.router.policy = Budget(self.ratio, self._price(wanted))
            self.waiting.clear()

    def _price(self, wanted: float) -> float:
        """At which the posteriors that wait cost `wanted`."""
        concentration = torch.cat(self.waiting, 1)  # [L, n, R, E]
        low, high = -STEEPEST, STEEPEST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            dear = self.count(Budget(self.ratio, middle)(concentration)) > wanted
            low, high = (middle, high) if dear else (low, middle)
        return high


@contextmanager
def holding(router: RoutedLanguage, budget: float) -> Iterator[Holding]:
    """Hold `budget` over the passes of the block; the last price stays."""
    least = float(router.layer_cost.amin(-1).mean())
    require(
        isinstance(budget, Real) and budget is not True and least < budget <= 1,
        "budget",
        f"a cost above {least:.3f}, every token on the cheapest expert, and at most 1",
        budget,
    )
    kind = type(router.policy)
    fix = "router.policy = Argmax() first; no other is held, and a guard would be lost"
    require(kind in (Argmax, Budget), "policy", "Argmax or Budget", kind.__name__, fix)
    held = Holding(router, budget)
    hook = router.model.register_forward_hook(lambda module, given, out: held.see())
    try:
        yield held
    finally:
        hook.remove()
