"""Routes that are given and not inferred: one expert for all, choices, or weights."""

from collections.abc import Sequence

from torch import Tensor

from bayes_router.checks import require, unknown
from bayes_router.types import Route

Force = str | Tensor
"""The name of an expert, choices int64 [L, B, T], or weights [L, B, T, E]."""


def forced_route(force: Force, experts: Sequence[str], num_layers: int) -> Route:
    """The route that sends every token where `force` says, whatever its hidden state."""
    if isinstance(force, str):
        if force not in experts:
            raise unknown("force", force, experts)
        index = list(experts).index(force)
        return lambda layer, hidden: index
    require(force.shape[0] == num_layers, "force", f"a first dimension of {num_layers} layers", tuple(force.shape))

    def route(layer: int, hidden: Tensor) -> Tensor:
        choice = force[layer].to(hidden.device)
        require(choice.shape[:2] == hidden.shape[:2], "force", f"[L, {hidden.shape[0]}, {hidden.shape[1]}]", tuple(force.shape))
        return choice

    return route
