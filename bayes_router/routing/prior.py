"""The prior over routes: what an expert costs decides how much a priori mass it gets."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.config import require
from bayes_router.routing.posterior import categorical_entropy, expected_entropy
from bayes_router.types import unknown

PriorMap = Callable[[Tensor, float], Tensor]


def boltzmann(cost_ratio: Tensor, temperature: float) -> Tensor:
    """Proportional to exp(-cost / temperature): the map of least information for a given mean cost."""
    return torch.softmax(-cost_ratio / temperature, -1)


def inverse(cost_ratio: Tensor, temperature: float) -> Tensor:
    """Proportional to cost^(-1 / temperature)."""
    return torch.softmax(-cost_ratio.log() / temperature, -1)


def uniform(cost_ratio: Tensor, temperature: float) -> Tensor:
    """The same for every expert: a prior that knows no cost."""
    return torch.full_like(cost_ratio, 1 / cost_ratio.shape[-1])


PRIOR_MAPS: dict[str, PriorMap] = {"boltzmann": boltzmann, "inverse": inverse, "uniform": uniform}


class PriorPredictive(NamedTuple):
    """What the prior says before any text is seen; means over layers and draws."""

    cost: float  # E[cost_ratio . route]: cost ratio of the mixture, and of a route drawn from it
    entropy_of_mean: float  # nats
    expected_entropy: float  # nats, of a draw
    load: Tensor  # [E], mean


class ComputeAwarePrior:
    """p(route_l[b, t]) = Dirichlet(total_concentration_l * mean_l), mean_l = map(cost_ratio, temperature_l).

    Fixed, not learned: base rates that follow the tokens press on nothing.

    Args:
        cost_ratio: cost of each expert in (0, 1], full = 1.
        num_layers: L.
        total_concentration: one number, or one a layer.
        temperature: one number, or one a layer.
        map: name of a map from cost ratio to mean, see `PRIOR_MAPS`.
        layer_mean: the mean of every layer by hand, [L, E] probabilities; overrides the map.

    Raises:
        ValueError: costs out of range or all zero, a concentration or temperature not positive, an unknown map.
    """

    def __init__(
        self,
        cost_ratio: Sequence[float] | Tensor,
        num_layers: int,
        total_concentration: float | Sequence[float] = 0.5,
        temperature: float | Sequence[float] = 1.0,
        map: str = "boltzmann",  # noqa: A002
        layer_mean: Sequence[Sequence[float]] | None = None,
    ):
        ratios = torch.as_tensor(cost_ratio, dtype=torch.float32)
        given = [round(float(r), 6) for r in ratios]
        require(ratios.dim() == 1 and len(given) >= 1, "cost_ratio", "one number for each expert", given)
        require(any(r > 0 for r in given), "cost_ratio", "not all zero", given)
        require(
            all(0 < r <= 1 for r in given),
            "cost_ratio",
            "numbers in (0, 1], the cost relative to full attention",
            given,
            "divide by the cost of full attention",
        )
        if map not in PRIOR_MAPS:
            raise unknown("prior.map", map, PRIOR_MAPS)
        self.cost_ratio, self.map = ratios, map
        self.temperature = _per_layer("temperature", temperature, num_layers)
        self.total_concentration = _per_layer("total_concentration", total_concentration, num_layers)
        self._layer_mean = None if layer_mean is None else torch.tensor([list(map_) for map_ in layer_mean])
        if self._layer_mean is not None:
            require(
                self._layer_mean.shape == (num_layers, len(given))
                and bool((self._layer_mean > 0).all())
                and torch.allclose(self._layer_mean.sum(-1), torch.ones(num_layers), atol=1e-4),
                "prior.layer_mean",
                f"{num_layers} rows of {len(given)} positive probabilities that sum to 1",
                self._layer_mean.tolist(),
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.temperature)

    @property
    def mean(self) -> Tensor:
        """Prior mean of every layer, [L, E]."""
        if self._layer_mean is not None:
            return self._layer_mean
        return torch.stack([PRIOR_MAPS[self.map](self.cost_ratio, t) for t in self.temperature])

    @property
    def concentration(self) -> Tensor:
        """Concentration of every layer, [L, E]."""
        return self.mean * torch.tensor(self.total_concentration)[:, None]

    def prior_predictive(self) -> PriorPredictive:
        """Mean cost and entropies implied by the prior, in closed form."""
        mean, concentration = self.mean, self.concentration
        return PriorPredictive(
            cost=float((mean @ self.cost_ratio).mean()),
            entropy_of_mean=float(categorical_entropy(mean).mean()),
            expected_entropy=float(expected_entropy(concentration).mean()),
            load=mean.mean(0),
        )

    def sample(self, num_samples: int) -> Tensor:
        """Draws of routes, [num_samples, L, E]."""
        return Dirichlet(self.concentration).sample((num_samples,))


def _per_layer(name: str, value: float | Sequence[float], num_layers: int) -> tuple[float, ...]:
    values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * num_layers
    require(len(values) == num_layers, name, f"one number, or one for each of {num_layers} layers", value)
    require(all(0 < v < float("inf") for v in values), name, "positive numbers", value)
    return values
