"""A compute budget: the price of cost at which the realised cost of executed routes meets it on held-out text."""

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.tokens import TokenSource
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.routing.policy import Budget
from bayes_router.types import RoutingMode

STEEPEST = 1e4  # nats per unit of cost: at this price every token takes the cheapest expert, at minus this the costliest
TOLERANCE = 0.005
RESOLUTION = 1e-6  # prices closer than this, relative to theirs where that is above 1, count as one


@torch.no_grad()
def routed_posteriors(router: RoutedPretrained, source: TokenSource, context: int, limit: int) -> tuple[Tensor, float]:
    """Concentrations [L, N, E] of held-out tokens and the realised cost, routes executed under the present policy."""
    device, concentrations, costs = next(router.model.parameters()).device, [], []
    cost = router.layer_cost.to(device)
    for batch in source.windows(context, 1, limit):
        out = router(batch.tokens.to(device), RoutingMode.HARD, **({"use_cache": False} if router.causal else {}))
        concentrations.append(out.concentration.flatten(1, 2))
        costs.append(cost.gather(1, out.route.flatten(1)).double().mean())
    return torch.cat(concentrations, 1), float(torch.stack(costs).mean())


def price_for(concentration: Tensor, layer_cost: Tensor, budget: float) -> float:
    """The lowest price at which `Budget` spends at most `budget` on these posteriors [L, N, E], by bisection."""

    def spent(price: float) -> float:
        choices = [Budget(tuple(cost.tolist()), price)(q) for cost, q in zip(layer_cost, concentration, strict=True)]
        return float(layer_cost.gather(1, torch.stack(choices)).double().mean())

    low, high = -STEEPEST, STEEPEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high


def solve(
    router: RoutedPretrained, source: TokenSource, budget: float, context: int, limit: int, tolerance: float = TOLERANCE
) -> float:
    """Set the router's policy to the price at which executed routes cost `budget` within 0.005; what they cost.

    In a jump, where many tokens share one posterior, the nearer end does if it is within `tolerance`.

    Routes of early layers change what later controllers read, so every cost is that of a pass that was executed. Between a
    price that costs more and one that costs less, the next is in turn the one that would do were the posteriors those of the
    last pass, the one just below (a jump is found at once), and the middle.

    Raises:
        ValueError: no price does. The policy is then what it was.
    """
    require(tolerance >= 0, "tolerance", "0 or more", tolerance)
    costs = tuple(router.cost_ratio.tolist())
    least, most = (float(ends.double().mean()) for ends in (router.layer_cost.amin(1), router.layer_cost.amax(1)))
    require(
        least - TOLERANCE <= budget <= most + TOLERANCE,
        "budget",
        f"a cost from {least:.3f} (every token on its layer's cheapest expert) to {most:.3f} (on the costliest)",
        budget,
    )
    (low, dear), (high, cheap) = (-STEEPEST, most), (STEEPEST, least)  # prices, and what they cost
    price, passes, usual = 0.0, 0, router.policy
    was_training, before = router.training, router._force
    router.train(False)
    router._force = None
    try:
        if most - budget <= TOLERANCE or budget - least <= TOLERANCE:
            price = low if most - budget <= budget - least else high
        while True:
            router.policy = Budget(costs, price)
            concentration, realised = routed_posteriors(router, source, context, limit)
            if abs(realised - budget) <= TOLERANCE:
                usual = router.policy
                return realised
            if realised > budget:
                low, dear = price, realised
            else:
                high, cheap = price, realised
            near = RESOLUTION * max(1.0, abs(low))
            if high - low <= near:
                break
            guess = price_for(concentration, router.layer_cost.to(concentration.device), budget)
            tried = (guess, guess - 0.9 * near, torch.inf)[passes % 3]
            price, passes = tried if low < tried < high else (low + high) / 2, passes + 1
        near_price, realised = min((low, dear), (high, cheap), key=lambda end: abs(end[1] - budget))
        if abs(realised - budget) <= tolerance:
            usual = Budget(costs, near_price)
            return realised
    finally:
        router.train(was_training)
        router._force, router.policy = before, usual
    raise ValueError(
        f"budget: expected a cost that some price realises within {max(tolerance, TOLERANCE):g}; got {budget:g}; at price "
        f"{low:.4g} the executed cost jumps from {dear:.3f} to {cheap:.3f}, for many tokens share one posterior: fit longer, "
        "choose one of these two, or give tolerance="
    )
