"""The prior over routes: what an expert costs decides how much a priori mass it gets."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import not_negative, require, unknown
from bayes_router.routing.by_layer import OfLayers, aligned, by_layer, checked_costs, per_layer
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

    Fixed, not learned: base rates that follow the tokens press on nothing. What is given by layer
    may be given by layer and unit of routing, [L, R]; `mean`, `concentration`, `charged` and `tilt`
    are by unit where something they are made of is.

    Args:
        cost_ratio: cost of each expert in (0, 1], full = 1.
        num_layers: L.
        total_concentration: one number, one a layer, or [L, R].
        temperature: one number, one a layer, or [L, R].
        map: name of a map from cost ratio to mean, see `PRIOR_MAPS`.
        layer_mean: the mean by hand, probabilities [L, E] or [L, R, E]; overrides the map.
        price: nats per unit of cost ratio; the density is tilted by exp(-tilt . route), tilt =
            price * charged.
        layer_cost_ratio: costs that the map and the tilt take instead, [L, E] or [L, R, E].
        layer_price_ratio: by which the price is multiplied, [L] or [L, R].

    Attributes:
        charged: what the price multiplies: the costs, times the ratios of prices; [E], or [L, E] or
            [L, R, E] where layers or units differ.

    Raises:
        ValueError: costs out of range or all zero, a concentration or temperature not positive, an
            unknown map.
    """

    def __init__(
        self,
        cost_ratio: Sequence[float] | Tensor,
        num_layers: int,
        total_concentration: OfLayers = 0.5,
        temperature: OfLayers = 1.0,
        map: str = "boltzmann",  # noqa: A002
        layer_mean: Any = None,
        price: float = 0.0,
        layer_cost_ratio: Any = None,
        layer_price_ratio: Any = None,
    ):
        self.price = not_negative("price", price, "0 or more nats per unit of cost")
        ratios = checked_costs(cost_ratio)
        if map not in PRIOR_MAPS:
            raise unknown("prior.map", map, PRIOR_MAPS)
        self.cost_ratio, self.map = ratios, map
        self.temperature = per_layer("temperature", temperature, num_layers)
        self.total_concentration = per_layer("total_concentration", total_concentration, num_layers)
        size = (num_layers, len(ratios))
        self._layer_mean = by_layer("prior.layer_mean", layer_mean, size)
        if self._layer_mean is not None:
            sums = self._layer_mean.sum(-1)
            require(
                torch.allclose(sums, torch.ones_like(sums), atol=1e-4),
                "prior.layer_mean",
                f"{num_layers} rows of {len(ratios)} positive probabilities that sum to 1",
                self._layer_mean.tolist(),
            )
        costs = by_layer("prior.layer_cost_ratio", layer_cost_ratio, size)
        self._costs = ratios if costs is None else costs
        self.charged = self._costs
        if layer_price_ratio is not None:
            times = per_layer("prior.layer_price_ratio", layer_price_ratio, num_layers)
            of_each = torch.tensor(times)[..., None]  # [L, 1] or [L, R, 1]
            costs = self._costs.expand(num_layers, -1) if costs is None else costs
            self.charged = torch.mul(*aligned(of_each, costs))
        by_unit = {x.shape[1] for x in (self.mean, self.concentration, self.charged) if x.dim() > 2}
        require(
            len(by_unit) < 2,
            "prior",
            "as many units of a layer in all that is given by unit",
            sorted(by_unit),
        )
        self.num_units = max(by_unit, default=1)

    @property
    def tilt(self) -> Tensor:
        """Price * charged, [E], [L, E] or [L, R, E], nats per unit of weight on each expert."""
        return self.price * self.charged

    def of_layers(self) -> Tensor:
        """`charged` of every layer, [L, E] or [L, R, E]."""
        return self.charged if self.charged.dim() > 1 else self.charged.expand(self.num_layers, -1)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.temperature)

    @property
    def mean(self) -> Tensor:
        """Prior mean of every layer, [L, E], or of every unit, [L, R, E]."""
        if self._layer_mean is not None:
            return self._layer_mean
        map_, costs = PRIOR_MAPS[self.map], self._costs
        rows = []
        for layer, t in enumerate(self.temperature):
            cost = costs if costs.dim() == 1 else costs[layer]
            if isinstance(t, float):
                rows.append(map_(cost, t))
                continue
            of_units = cost.expand(len(t), -1)
            rows.append(
                torch.stack([map_(c, of_unit) for c, of_unit in zip(of_units, t, strict=True)])
            )
        return torch.stack(rows)

    @property
    def concentration(self) -> Tensor:
        """Concentration of every layer, [L, E], or of every unit, [L, R, E]."""
        return torch.mul(*aligned(self.mean, self.totals))

    @property
    def totals(self) -> Tensor:
        """`total_concentration` as [L, 1] or [L, R, 1]."""
        return torch.tensor(self.total_concentration)[..., None]

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
            _, mean, entropy, _ = tilted_moments(*aligned(concentration, price * self.charged))
        return PriorPredictive(
            cost=float((mean @ self.cost_ratio.to(mean)).mean()),
            entropy_of_mean=float(categorical_entropy(mean).mean()),
            expected_entropy=float(entropy.mean()),
            load=mean.float().flatten(0, -2).mean(0),
        )

    def sample(self, num_samples: int, price: float | None = None) -> Tensor:
        """Draws of routes, [num_samples, L, E] or [num_samples, L, R, E], exact, also under a tilt.

        `price` is another than the prior's own.
        """
        price = self.price if price is None else price
        if price == 0:
            return Dirichlet(self.concentration).sample(torch.Size([num_samples]))
        concentration, tilt = aligned(self.concentration, price * self.charged)
        shape = torch.broadcast_shapes(concentration.shape, tilt.shape)
        return sample_tilted(concentration.expand(shape), tilt, num_samples).float()

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
