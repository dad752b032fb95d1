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


def forced_route(force: Force, experts: Sequence[str], num_layers: int, num_units: int) -> Route:
    """The route that sends every token where `force` says, whatever its hidden state.

    Raises:
        ValueError: it is no expert's name, or choices or weights of other layers, units or experts.
    """
    if isinstance(force, str):
        if force not in experts:
            raise unknown("force", force, experts)
    else:
        _check(force, len(experts), num_layers, num_units)
    return as_told(force, experts)


def as_told(force: Force, experts: Sequence[str]) -> Route:
    """`forced_route` of what was checked before."""
    if isinstance(force, str):
        index = list(experts).index(force)
        return lambda layer, hidden: index

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


def _check(force: Tensor, num_experts: int, num_layers: int, num_units: int) -> None:
    """Choices on a GPU are not read, which would wait for it: its kernels refuse wrong ones."""
    kind = type(force).__name__
    require(isinstance(force, Tensor), "force", "an expert's name, or choices [L, B, T, R]", kind)
    shape, soft = tuple(force.shape), force.is_floating_point()
    expected = f"a first dimension of {num_layers} layers"
    require(bool(shape) and shape[0] == num_layers, "force", expected, shape)
    if soft:
        weighs = len(shape) in (4, 5) and shape[-1] == num_experts
        require(weighs, "force", f"weights [L, B, T, R, {num_experts}]", shape)
        numbers = force.device.type != "cpu" or bool(force.isfinite().all())
        require(numbers, "force", "weights that are finite numbers", "NaN or infinity")
    else:
        require(
            force.dtype in (torch.int64, torch.int32),
            "force",
            "choices int64, or weights",
            force.dtype,
        )
        require(len(shape) in (3, 4), "force", "choices [L, B, T, R]", shape)
    units = shape[3] if len(shape) == 4 + soft else 1
    require(units in (1, num_units), "force", f"1 or {num_units} routing units", units)
    if not soft and force.device.type == "cpu" and force.numel():
        ends = int(force.min()), int(force.max())
        inside = ends[0] >= 0 and ends[1] < num_experts
        require(inside, "force", f"choices from 0 to {num_experts - 1}", ends)


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
