"""What a prior is given: costs of the experts, and numbers by layer, or by layer and unit."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_router.checks import require

OfLayers = float | Sequence[float | Sequence[float]]
"""One number, one a layer, or one a unit of each layer."""


def checked_costs(cost_ratio: Sequence[float] | Tensor) -> Tensor:
    """Costs of the experts, float32 [E], in (0, 1]."""
    listed = isinstance(cost_ratio, Sequence | Tensor)
    require(listed, "cost_ratio", "one number for each expert", cost_ratio)
    ratios = torch.as_tensor(cost_ratio, dtype=torch.float32)
    given = [round(float(r), 6) for r in ratios]
    listed = ratios.dim() == 1 and len(given) >= 1
    require(listed, "cost_ratio", "one number for each expert", given)
    require(any(r > 0 for r in given), "cost_ratio", "not all zero", given)
    require(
        all(0 < r <= 1 for r in given),
        "cost_ratio",
        "numbers in (0, 1], the cost relative to full attention",
        given,
        "divide by the cost of full attention; where an expert costs more than full, take a "
        "longer context or leave it out",
    )
    return ratios


def per_layer(name: str, value: Any, num_layers: int) -> tuple[Any, ...]:
    """Of each layer, a number or a tuple of one for each unit."""
    values = (
        tuple(tuple(map(float, v)) if isinstance(v, Sequence) else float(v) for v in value)
        if isinstance(value, Sequence)
        else (float(value),) * num_layers
    )
    units = {len(v) if isinstance(v, tuple) else 0 for v in values}
    require(
        len(values) == num_layers and len(units) == 1,
        name,
        f"one number, or one for each of {num_layers} layers, or of each of their units",
        value,
    )
    numbers = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
    require(all(0 < v < float("inf") for v in numbers), name, "positive numbers", value)
    return values


def by_layer(name: str, value: Any, size: tuple[int, int]) -> Tensor | None:
    """Positive numbers [L, E] or [L, R, E]; None where none are given."""
    if value is None:
        return None
    try:
        given = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError):  # rows of different lengths
        given = torch.zeros(0)
    fits = given.dim() in (2, 3) and given.shape[:: given.dim() - 1] == size
    require(
        fits and bool(((given > 0) & (given < math.inf)).all()),
        name,
        f"{size[0]} rows of {size[1]} positive numbers, or as many for each unit",
        value.tolist() if isinstance(value, Tensor) else value,
    )
    return given


def aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both by unit, [L, R or 1, E], where one of them is; what is [E] alone stays."""
    if a.dim() == b.dim() or 1 in (a.dim(), b.dim()):
        return a, b
    return (a, b[:, None]) if a.dim() > b.dim() else (a[:, None], b)
