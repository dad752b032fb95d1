"""The prior over routes: what an expert costs decides how much a priori mass it gets."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import not_negative, require, unknown
from bayes_router.routing.posterior import categorical_entropy, expected_entropy
from bayes_router.routing.tilt import sample_tilted, tilted_moments

PriorMap = Callable[[Tensor, float], Tensor]


def boltzmann(cost_ratio: Tensor, temperature: float) -> Tensor:
    """Proportional to exp(-cost / temperature).

    The map of least information for a given mean cost.
    """
    return torch.softmax(-cost_ratio / temperature, -1)


def inverse(cost_ratio: Tensor, temperature: float) -> Tensor:
    """Proportional to cost^(-1 / temperature)."""
    return torch.softmax(-cost_ratio.log() / temperature, -1)


def uniform(cost_ratio: Tensor, temperature: float) -> Tensor:
    """The same for every expert: a prior that knows no cost."""
    return torch.full_like(cost_ratio, 1 / cost_ratio.shape[-1])


PRIOR_MAPS: dict[str, PriorMap] = {"boltzmann": boltzmann, "inverse": inverse, "uniform": uniform}


class PriorPredictive(NamedTuple):
    """What the prior says of one token before any text is seen; means over layers and draws."""

    cost: float  # E[cost_ratio . route]: cost ratio of the mixture, and of a route drawn from it
    entropy_of_mean: float  # nats
    expected_entropy: float  # nats, of a draw
    load: Tensor  # [E], mean


class ComputeAwarePrior:
    """p(route_l[b, t]) = Dirichlet(total_concentration_l * mean_l).

    mean_l = map(cost_ratio, temperature_l).

    Fixed, not learned: base rates that follow the tokens press on nothing.

    Args:
        cost_ratio: cost of each expert in (0, 1], full = 1.
        num_layers: L.
        total_concentration: one number, or one a layer.
        temperature: one number, or one a layer.
        map: name of a map from cost ratio to mean, see `PRIOR_MAPS`.
        layer_mean: the mean of every layer by hand, [L, E] probabilities; overrides the map.
        price: nats per unit of cost ratio; the density is tilted by exp(-tilt . route), tilt =
            price * cost_ratio.

    Raises:
        ValueError: costs out of range or all zero, a concentration or temperature not positive, an
            unknown map.
    """

    def __init__(
        self,
        cost_ratio: Sequence[float] | Tensor,
        num_layers: int,
        total_concentration: float | Sequence[float] = 0.5,
        temperature: float | Sequence[float] = 1.0,
        map: str = "boltzmann",  # noqa: A002
        layer_mean: Sequence[Sequence[float]] | None = None,
        price: float = 0.0,
    ):
        self.price = not_negative("price", price, "0 or more nats per unit of cost")
        listed = isinstance(cost_ratio, Sequence | Tensor)
        require(listed, "cost_ratio", "one number for each expert", cost_ratio)
        ratios = torch.as_tensor(cost_ratio, dtype=torch.float32)
        given = [round(float(r), 6) for r in ratios]
        require(
            ratios.dim() == 1 and len(given) >= 1, "cost_ratio", "one number for each expert", given
        )
        require(any(r > 0 for r in given), "cost_ratio", "not all zero", given)
        require(
            all(0 < r <= 1 for r in given),
            "cost_ratio",
            "numbers in (0, 1], the cost relative to full attention",
            given,
            "divide by the cost of full attention; where an expert costs more than full, take a "
            "longer context or leave it out",
        )
        if map not in PRIOR_MAPS:
            raise unknown("prior.map", map, PRIOR_MAPS)
        self.cost_ratio, self.map = ratios, map
        self.temperature = _per_layer("temperature", temperature, num_layers)
        self.total_concentration = _per_layer(
            "total_concentration", total_concentration, num_layers
        )
        self._layer_mean = (
            None if layer_mean is None else torch.tensor([list(map_) for map_ in layer_mean])
        )
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
    def tilt(self) -> Tensor:
        """Price * cost_ratio, [E], nats per unit of weight on each expert."""
        return self.price * self.cost_ratio

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

    def prior_predictive(self, price: float | None = None) -> PriorPredictive:
        """Mean cost and entropies implied by the prior.

        In closed form, or exact to about 1e-9 with a tilt.

        Args:
            price: another than the prior's own.
        """
        price = self.price if price is None else price
        mean, concentration = self.mean, self.concentration
        entropy = expected_entropy(concentration)
        if price != 0:
            _, mean, entropy, _ = tilted_moments(concentration, price * self.cost_ratio)
        return PriorPredictive(
            cost=float((mean @ self.cost_ratio.to(mean)).mean()),
            entropy_of_mean=float(categorical_entropy(mean).mean()),
            expected_entropy=float(entropy.mean()),
            load=mean.float().mean(0),
        )

    def sample(self, num_samples: int, price: float | None = None) -> Tensor:
        """Draws of routes, [num_samples, L, E], exact, also under a tilt.

        `price` is another than the prior's own.
        """
        price = self.price if price is None else price
        if price == 0:
            return Dirichlet(self.concentration).sample(torch.Size([num_samples]))
        return sample_tilted(self.concentration, price * self.cost_ratio, num_samples).float()

    @classmethod
    def for_target_cost(
        cls,
        cost_ratio: Sequence[float] | Tensor,
        num_layers: int,
        target_cost: float,
        *,
        target_entropy: float | None = None,
        map: str = "boltzmann",  # noqa: A002
        total_concentration: float | None = None,
        price: float = 0.0,
    ) -> "ComputeAwarePrior":
        """The prior whose prior predictive costs `target_cost` on average.

        E[cost_ratio . route] = target_cost.

        The temperature is solved for; with `target_entropy` the total concentration too, so that
        E[H(route)] meets it. Without a price the two do not interact: mean cost depends on the
        temperature alone, from the cheapest expert (cold) to the plain mean over experts (hot), and
        the expected entropy rises with the total concentration, from 0 to the entropy of the mean.

        Args:
            cost_ratio: as for the class.
            num_layers: L; all layers get the same prior.
            target_cost: mean cost ratio of a route, full = 1.
            target_entropy: expected entropy of a route, nats; None leaves `total_concentration` as
                given.
            map: as for the class.
            total_concentration: 0.5 by default.
            price: of the prior that is returned, nats per unit of cost.

        Raises:
            ValueError: a target out of reach (the message names the range), or both
                `target_entropy` and `total_concentration` given.
        """
        require(
            target_entropy is None or total_concentration is None,
            "total_concentration",
            "None beside target_entropy, which determines it",
            total_concentration,
        )
        prior = cls(
            cost_ratio, 1, 0.5 if total_concentration is None else total_concentration, 1.0, map
        )
        solved = _met(prior, target_cost, target_entropy, price)
        total, temperature = solved.total_concentration[0], solved.temperature[0]
        return cls(prior.cost_ratio, num_layers, total, temperature, map, price=price)


TOTALS = (0.01, 1000.0)
"""Total concentrations that a solution may have: nearly one-hot draws to nearly constant ones."""
LEAST_MEAN = 1e-12
"""Of the costliest expert at the coldest temperature."""
SOLVED = 1e-6


def _met(
    prior: ComputeAwarePrior, target_cost: float, target_entropy: float | None, price: float
) -> ComputeAwarePrior:
    """A prior of one layer moved to the targets.

    Temperature for the cost, total concentration for the entropy.
    """
    ratios, map_, (given,) = prior.cost_ratio, prior.map, prior.total_concentration
    energy = ratios.log() if map_ == "inverse" else ratios
    spread = max(float(energy.max() - energy.min()), 1e-6)
    cold, hot = spread / -math.log(LEAST_MEAN), spread * 1e5
    fix = "change the target" + (
        ", lower the price or raise total_concentration" if price > 0 else ""
    )

    def cost(prior: ComputeAwarePrior) -> float:
        return prior.prior_predictive(price).cost

    def entropy(prior: ComputeAwarePrior) -> float:
        return prior.prior_predictive(price).expected_entropy

    def heated(total: float) -> ComputeAwarePrior:
        return ComputeAwarePrior(ratios, 1, total, hot, map_)

    def at(total: float) -> ComputeAwarePrior:
        def build(t: float) -> ComputeAwarePrior:
            return ComputeAwarePrior(ratios, 1, total, t, map_)

        return _solve(build, cost, target_cost, cold, hot, "target_cost", fix)

    if target_entropy is None:
        return at(given)
    low, high = TOTALS
    # under a price a sparse prior cannot cost so much; where does it begin to?
    if cost(heated(low)) < target_cost:
        low = (
            1.01
            * _solve(
                heated, cost, target_cost, low, high, "target_cost", "lower the price"
            ).total_concentration[0]
        )
    return _solve(
        at,
        entropy,
        target_entropy,
        low,
        high,
        "target_entropy",
        f"change it or target_cost {target_cost:g}",
    )


def _solve(
    build: Callable[[float], ComputeAwarePrior],
    value: Callable[[ComputeAwarePrior], float],
    target: float,
    low: float,
    high: float,
    name: str,
    fix: str,
) -> ComputeAwarePrior:
    """The prior build(x), low <= x <= high, whose value, which grows with x, is `target`."""
    from scipy.optimize import brentq

    least, most = value(build(low)), value(build(high))
    inside = least - SOLVED <= target <= most + SOLVED
    require(
        inside,
        name,
        f"a number from {least:.4f} to {most:.4f}, which this prior can reach",
        target,
        fix,
    )
    if target <= least or target >= most:  # at an end, up to rounding
        return build(low if target <= least else high)
    root = brentq(
        lambda log_x: value(build(math.exp(log_x))) - target,
        math.log(low),
        math.log(high),
        xtol=1e-9,
    )
    return build(math.exp(root))


def _per_layer(name: str, value: float | Sequence[float], num_layers: int) -> tuple[float, ...]:
    values = (
        tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * num_layers
    )
    require(
        len(values) == num_layers,
        name,
        f"one number, or one for each of {num_layers} layers",
        value,
    )
    require(all(0 < v < float("inf") for v in values), name, "positive numbers", value)
    return values
