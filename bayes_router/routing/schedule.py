"""What changes over training.

KL weight, total concentration (soft to hard), the prior's mean and price.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_router.config import ScheduleConfig
from bayes_router.routing.by_layer import aligned
from bayes_router.routing.prior import ComputeAwarePrior

KL_WARMUP_START = 0.01


@dataclass(frozen=True)
class ScheduleState:
    """The objective at one step."""

    kl_weight: float
    concentration: Tensor  # [L, E], of the prior, or [L, R, E] where units differ
    price: float  # nats per unit of cost ratio
    straight_through: bool = False  # execute the argmax of each draw


class Schedule:
    """Moves the prior from a start to the compute-aware, sparse one.

    The start favours chosen experts and soft routes.

    With w rising linearly from 0 at `anneal_from` to 1 at `anneal_to` (fractions of training):
    mean = (1 - w) start + w mean_l; log total = (1 - w) log start_total + w log total_l; price = w
    price.

    Args:
        config: the settings.
        prior: the compute-aware prior, where it ends.
        steps: of training.
        experts: names, in the order of the routing latent.
        price: of the prior's tilt at the end.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        prior: ComputeAwarePrior,
        steps: int,
        experts: Sequence[str],
        price: float = 0.0,
    ):
        self.config, self.prior, self.steps, self.price = config, prior, steps, price
        self._end_mean = self._start_mean = prior.mean  # [L, E] or [L, R, E]
        self._total = prior.totals
        if config.start_experts and len(experts) > 1:
            favoured = _of_units(config.start_experts, prior.num_layers, list(experts))  # [L, R]
            rest = (1 - config.start_share) / (len(experts) - 1)
            start = torch.full((*favoured.shape, len(experts)), rest)
            start.scatter_(2, favoured[..., None], config.start_share)
            start = start[:, 0] if favoured.shape[1] == 1 else start
            self._start_mean, self._end_mean = aligned(start, self._end_mean)

    def at(self, step: int) -> ScheduleState:
        """The objective at `step`."""
        config, progress = self.config, step / self.steps
        w = _ramp(progress, config.anneal_from, config.anneal_to)
        mean = (1 - w) * self._start_mean + w * self._end_mean
        total = config.start_total_concentration ** (1 - w) * self._total**w
        warm = _ramp(progress, 0.0, config.kl_warmup)
        kl_weight = config.kl_weight * (KL_WARMUP_START + (1 - KL_WARMUP_START) * warm)
        return ScheduleState(
            kl_weight,
            torch.mul(*aligned(mean, total)),
            w * self.price,
            progress >= config.straight_through_from,
        )


def _of_units(names: Sequence[str], num_layers: int, experts: list[str]) -> Tensor:
    """The expert that each unit favours, int64 [L, R]; R is 1 where no layer names several."""
    layers = [names[layer % len(names)].split(",") for layer in range(num_layers)]
    units = max(map(len, layers))
    return torch.tensor(
        [[experts.index(layer[u % len(layer)]) for u in range(units)] for layer in layers]
    )


def _ramp(progress: float, start: float, end: float) -> float:
    """0 before start, 1 from end on, linear between."""
    if progress >= end:
        return 1.0
    return max(0.0, (progress - start) / (end - start))
