"""How a layer routed: loads, cost, entropies, information.

And whether routing or posterior collapsed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bayes_router.routing.information import context_information
from bayes_router.routing.posterior import (
    categorical_entropy,
    expected_entropy,
    posterior_mean,
    route_information,
)


@dataclass(frozen=True)
class RoutingStatistics:
    """How one layer routed one batch.

    Entropies and information in nats, costs relative to full attention.

    Of a layer of several units everything is the mean over them, and `units` has the same of each.
    """

    experts: tuple[str, ...]
    load: tuple[float, ...]  # share of the tokens on each expert (soft weights: mean weight)
    cost: float  # cost ratio of the executed route
    entropy_of_mean: float  # mean over tokens
    expected_entropy: float  # mean over tokens
    route_information: float  # between token and route
    total_concentration: float  # mean over tokens
    # "none", "routing" (nearly all tokens on one expert) or "posterior" (one route for all tokens)
    collapse: str
    units: tuple["RoutingStatistics", ...] = ()  # of each unit, where there are several
    # what of the information the token at hand does not tell; None where its tokens were not given
    context_information: float | None = None

    def __repr__(self) -> str:
        load = ", ".join(
            f"{name} {share:.1%}" for name, share in zip(self.experts, self.load, strict=True)
        )
        known = self.context_information
        of_context = "" if known is None else f", {known:.3f} of it of context"
        return (
            f"RoutingStatistics(load: {load}; cost {self.cost:.3f}; information "
            f"{self.route_information:.3f} nats{of_context}; "
            f"entropy {self.entropy_of_mean:.3f}; collapse: {self.collapse})"
        )


ROUTING_COLLAPSE_LOAD = 0.99
POSTERIOR_COLLAPSE_INFORMATION = 1e-3


def executed_load(route: Tensor, num_experts: int) -> Tensor:
    """[E]: the share of the tokens on each expert.

    Of weights [..., E] (their mean) or choices int64 [...].
    """
    weights = route if route.is_floating_point() else nn.functional.one_hot(route, num_experts)
    return weights.reshape(-1, num_experts).float().mean(0)


def routing_statistics(
    concentration: Tensor,
    route: Tensor,
    cost_ratio: Tensor,
    experts: Sequence[str],
    tokens: Tensor | None = None,
) -> RoutingStatistics:
    """Summarise one layer's posteriors [B, T, R, E] and executed routes.

    The routes are [B, T, R, E] or int64 [B, T, R].

    `cost_ratio` is [E], or [R, E]. A layer has collapsed where all of its units have: in the way
    that they share, or, if some in one way and some in the other, by "posterior". With the ids of
    the tokens [B, T], I(context; choice | token) stands beside the information.
    """
    R = concentration.shape[2]
    costs = cost_ratio.expand(R, -1)
    units = tuple(
        _of_unit(concentration[:, :, r], route[:, :, r], costs[r], experts, tokens)
        for r in range(R)
    )
    if R == 1:
        return units[0]
    ways = {unit.collapse for unit in units}
    named = MEANS if tokens is None else (*MEANS, "context_information")
    means = {name: sum(getattr(unit, name) for unit in units) / R for name in named}
    load = tuple(sum(shares) / R for shares in zip(*(unit.load for unit in units), strict=True))
    collapse = ways.pop() if len(ways) == 1 else "none" if "none" in ways else "posterior"
    return RoutingStatistics(tuple(experts), load, collapse=collapse, units=units, **means)


MEANS = ("cost", "entropy_of_mean", "expected_entropy", "route_information", "total_concentration")


def _of_unit(
    concentration: Tensor,
    route: Tensor,
    cost_ratio: Tensor,
    experts: Sequence[str],
    tokens: Tensor | None,
) -> RoutingStatistics:
    """Of one unit: posteriors [B, T, E], routes [B, T, E] or int64 [B, T], costs [E]."""
    num_experts = len(experts)
    concentration = concentration.reshape(-1, num_experts)
    load = executed_load(route, num_experts)
    mean = posterior_mean(concentration)
    information = float(route_information(mean))
    of_context = None if tokens is None else float(context_information(tokens.flatten(), mean))
    collapse = "none"
    if num_experts > 1 and float(load.max()) > ROUTING_COLLAPSE_LOAD:
        collapse = "routing"
    elif num_experts > 1 and information < POSTERIOR_COLLAPSE_INFORMATION:
        collapse = "posterior"
    return RoutingStatistics(
        experts=tuple(experts),
        load=tuple(map(float, load)),
        cost=float(load @ cost_ratio.to(load)),
        entropy_of_mean=float(categorical_entropy(mean).mean()),
        expected_entropy=float(expected_entropy(concentration).mean()),
        route_information=information,
        total_concentration=float(concentration.sum(-1).mean()),
        collapse=collapse,
        context_information=of_context,
    )
