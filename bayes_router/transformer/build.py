"""Experts and priors as the settings describe them."""

import torch

from bayes_router.attention.cost import cost_ratios
from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.shapes import ExpertShape
from bayes_router.checks import choose
from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.routing.prior import ComputeAwarePrior
from bayes_router.types import CostModel


def build_experts(config: ModelConfig) -> list[Expert]:
    """The experts that a configuration names, in its order."""
    shape = ExpertShape(config.num_heads, config.head_dim, config.window)
    return [expert_class(name)(shape) for name in config.experts]


def build_prior(
    prior: PriorConfig, model: ModelConfig, num_layers: int, context: int
) -> ComputeAwarePrior:
    """The prior that the settings describe, its price included.

    FLOPs and latency are those at `context` tokens.
    """
    prior.check_shapes(num_layers, len(model.experts), model.num_units)
    ratios = (
        torch.tensor(prior.cost_ratio)
        if prior.cost_ratio is not None
        else cost_ratios(build_experts(model), choose("prior.cost", prior.cost, CostModel), context)
    )
    return ComputeAwarePrior(
        ratios,
        num_layers,
        prior.layer_total_concentration or prior.total_concentration,
        prior.layer_temperature or prior.temperature,
        prior.map,
        prior.layer_mean,
        prior.price,
        prior.layer_cost_ratio,
        prior.layer_price_ratio,
    )
