"""A compute budget: the price of cost at which the realised cost of executed routes meets it on held-out text."""

import torch
from torch import Tensor

from bayes_router.config import require
from bayes_router.data.tokens import TokenSource
from bayes_router.integrations.huggingface import RoutedPretrained
from bayes_router.routing.policy import Budget
from bayes_router.types import RoutingMode

STEPEST = 1e4  # nats per unit of cost: at this price every token takes the cheapest expert
ROUNDS = 6
TOLERANCE = 0.01


@torch.no_grad()
def routed_posteriors(router: RoutedPretrained, source: TokenSource, context: int, limit: int) -> tuple[Tensor, float]:
    """Concentrations [L, N, E] of held-out tokens and the realised cost, routes executed under the present policy."""
    device, concentrations, costs = next(router.model.parameters()).device, [], []
    ratio = router.cost_ratio.to(device)
    for batch in source.windows(context, 1, limit):
        out = router(batch.tokens.to(device), RoutingMode.HARD)
        concentrations.append(out.concentration.flatten(1, 2))
        costs.append(ratio[out.route].mean())
    return torch.cat(concentrations, 1), float(torch.stack(costs).mean())


def price_for(concentration: Tensor, cost_ratio: Tensor, budget: float) -> float:
    """The lowest price at which `Budget` spends at most `budget` on these posteriors, by bisection."""

    def spent(price: float) -> float:
        return float(cost_ratio[Budget(tuple(cost_ratio.tolist()), price)(concentration)].mean())

    low, high = -STEPEST, STEPEST
    if spent(low) <= budget:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high


def solve(router: RoutedPretrained, source: TokenSource, budget: float, context: int, limit: int) -> float:
    """Set the router's policy to the price that meets `budget`, and return the realised cost.

    Routes of early layers change what later controllers read, so the price is solved and the routes are executed in turn,
    until they agree within 0.01 or for six rounds; the closest round that does not overspend by more is kept.

    Raises:
        ValueError: the budget is below the cheapest expert's cost, or not positive.
    """
    ratio = router.cost_ratio
    least, most = float(ratio.min()), float(ratio.max())
    require(budget >= least, "budget", f"a cost ratio from {least:.3f} (the cheapest expert) to {most:.3f}", budget)
    costs, price = tuple(ratio.tolist()), 0.0
    best: tuple[float, float, float] | None = None  # (distance, price, realised)
    was_training = router.training
    router.train(False)
    before, router._force = router._force, None
    try:
        for _ in range(ROUNDS):
            router.policy = Budget(costs, price)
            concentration, realised = routed_posteriors(router, source, context, limit)
            distance = abs(realised - min(budget, most)) + max(realised - budget - TOLERANCE, 0.0)
            if best is None or distance < best[0]:
                best = (distance, price, realised)
            if distance <= TOLERANCE:
                break
            price = price_for(concentration, ratio.to(concentration.device), min(budget, most))
    finally:
        router.train(was_training)
        router._force = before
    assert best is not None
    router.policy = Budget(costs, best[1])
    return best[2]
