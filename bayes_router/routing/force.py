"""Routes that are given and not inferred: one expert for all, choices, or weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_router.checks import require, unknown
from bayes_router.types import Route

Force = str | Tensor
"""The name of an expert, choices int64 [L, B, T, R], or weights [L, B, T, R, E].

Without the dimension R for all units.
"""


def forced_route(force: Force, experts: Sequence[str], num_layers: int) -> Route:
    """The route that sends every token where `force` says, whatever its hidden state."""
    if isinstance(force, str):
        if force not in experts:
            raise unknown("force", force, experts)
        index = list(experts).index(force)
        return lambda layer, hidden: index
    kind = type(force).__name__
    require(isinstance(force, Tensor), "force", "an expert's name, or choices [L, B, T, R]", kind)
    require(
        force.shape[0] == num_layers,
        "force",
        f"a first dimension of {num_layers} layers",
        tuple(force.shape),
    )

    def route(layer: int, hidden: Tensor) -> Tensor:
        choice = force[layer].to(hidden.device)
        require(
            choice.shape[:2] == hidden.shape[:2],
            "force",
            f"[L, {hidden.shape[0]}, {hidden.shape[1]}]",
            tuple(force.shape),
        )
        return choice

    return route


def as_units(route: Tensor | int, concentration: Tensor) -> Tensor:
    """An executed route as results hold it, beside the posterior's concentration [B, T, R, E].

    One expert for all, choices [B, T] and weights [B, T, E] become those of every unit.
    """
    shape = concentration.shape[:-1]
    if isinstance(route, int):
        return torch.full(shape, route, dtype=torch.int64, device=concentration.device)
    soft = route.is_floating_point()
    with_r = route.unsqueeze(2) if route.dim() == (3 if soft else 2) else route
    return with_r.expand(*shape, with_r.shape[-1]) if soft else with_r.expand(shape)
