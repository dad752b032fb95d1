"""What the layers of a patched model cost: one that slides already pays for its own window alone."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayes_router.attention.cost import cost_ratios
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.shapes import ExpertShape
from bayes_router.checks import choose
from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.routing.prior import PRIOR_MAPS, ComputeAwarePrior
from bayes_router.transformer.build import build_experts
from bayes_router.types import CostModel


def layer_costs(prior: PriorConfig, config: ModelConfig, context: int, windows: Sequence[int | None]) -> tuple[Tensor, Tensor]:
    """Costs relative to attention over all keys = 1: of the experts [E], and of the experts in each layer [L, E].

    In a layer whose own attention sees a window shorter than `context`, `full` is local attention of that window and costs what
    the prior's cost model says of that; `local` costs no more there. Ratios given by hand hold in every layer.
    """
    if prior.cost_ratio is not None:
        ratio = torch.tensor(prior.cost_ratio)
        return ratio, ratio.repeat(len(windows), 1)
    model = choose("prior.cost", prior.cost, CostModel)
    ratio, costs = cost_ratios(build_experts(config), model, context), []
    for window in windows:
        cost = ratio.clone()
        if window is not None and window < context:
            own = LocalAttention(ExpertShape(config.num_heads, config.head_dim, window))
            full = config.experts.index("full")
            cost[full] = cost_ratios([own], model, context)[0].clamp_max(ratio[full])
            for index, name in enumerate(config.experts):
                if name == "local":
                    cost[index].clamp_max_(cost[full])
        costs.append(cost)
    return ratio, torch.stack(costs)


def layer_prior(config: PriorConfig, cost_ratio: Tensor, layer_cost: Tensor) -> ComputeAwarePrior:
    """The prior that the settings describe; the mean of each layer is that of its own costs."""
    layers = len(layer_cost)
    total, temperature = config.layer_total_concentration, config.layer_temperature
    prior = ComputeAwarePrior(
        cost_ratio,
        layers,
        total or config.total_concentration,
        temperature or config.temperature,
        config.map,
        config.layer_mean,
    )
    if config.layer_mean is not None or bool((layer_cost == cost_ratio).all()):
        return prior
    means = [PRIOR_MAPS[config.map](cost, t).tolist() for cost, t in zip(layer_cost, prior.temperature, strict=True)]
    return layer_prior(replace(config, layer_mean=tuple(map(tuple, means))), cost_ratio, layer_cost)
