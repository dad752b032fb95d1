"""The sections `prior` and `schedule`: what routes cost before the text is read, and when."""

from dataclasses import dataclass
from typing import Optional

from bayes_router.checks import choose, not_negative, positive, require
from bayes_router.types import CostModel


@dataclass(frozen=True)
class PriorConfig:
    """The compute-aware prior.

    Dirichlet(total_concentration * mean(cost)) for every token and layer.

    Attributes:
        cost: where cost ratios come from: paper, flops or latency.
        cost_ratio: cost ratios by hand, one an expert, full = 1; overrides `cost`.
        map: from cost ratio to prior mean: boltzmann, inverse or uniform.
        temperature: of the Boltzmann map; small means cheap.
        total_concentration: sum of the concentration; below 1 draws are nearly one-hot.
        price: nats per unit of cost ratio by which the prior is tilted, density times exp(-price *
            cost . route).
        layer_mean: prior mean of each layer by hand, one probability an expert; overrides the map.
        layer_temperature: temperature of each layer instead of one for all.
        layer_total_concentration: total concentration of each layer instead of one for all.
    """

    cost: str = "paper"
    cost_ratio: Optional[tuple[float, ...]] = None
    map: str = "boltzmann"
    temperature: float = 0.3
    total_concentration: float = 0.5
    price: float = 10.0
    layer_mean: Optional[tuple[tuple[float, ...], ...]] = None
    layer_temperature: Optional[tuple[float, ...]] = None
    layer_total_concentration: Optional[tuple[float, ...]] = None

    def __post_init__(self) -> None:
        """Check every field that does not need the experts."""
        for name, depth in (("mean", 2), ("temperature", 1), ("total_concentration", 1)):
            given, least = getattr(self, f"layer_{name}"), 0
            while isinstance(given, tuple) and given:
                given, least = given[0], least + 1
            require(
                least <= depth,
                f"prior.layer_{name}",
                "values by layer, which hold for all of its units",
                getattr(self, f"layer_{name}"),
                "a prior by unit is given to the program: RoutingModel(network, concentration "
                "[L, R, E])",
            )
        choose("prior.cost", self.cost, CostModel)
        for name in ("temperature", "total_concentration"):
            require(
                getattr(self, name) > 0, f"prior.{name}", "a positive number", getattr(self, name)
            )
            per_layer = getattr(self, f"layer_{name}")
            require(
                per_layer is None or min(per_layer) > 0,
                f"prior.layer_{name}",
                "positive numbers",
                per_layer,
            )
        not_negative("prior.price", self.price, "0 or more nats per unit of cost")


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes over training; times are fractions of it.

    Attributes:
        kl_weight: weight of the KL in the objective at the end; 1 is the literal ELBO.
        kl_warmup: fraction over which the KL weight grows linearly from a hundredth of it.
        start_total_concentration: total concentration of the prior before annealing (soft routes).
        start_experts: the expert that each layer's prior favours before annealing, cycled over
            layers; empty starts with the compute-aware prior.
        start_share: prior mean of that expert before annealing.
        anneal_from: when annealing of the prior (mean, total concentration and price) begins.
        anneal_to: when it ends.
        straight_through_from: when the network starts to execute the argmax of each draw, with the
            gradient of the draw; 1 is never.
    """

    kl_weight: float = 0.003
    kl_warmup: float = 0.0
    start_total_concentration: float = 0.5
    start_experts: tuple[str, ...] = ()
    start_share: float = 0.9
    anneal_from: float = 0.2
    anneal_to: float = 0.6
    straight_through_from: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        positive("schedule.kl_weight", self.kl_weight, "a tiny one stands for zero")
        require(
            0 <= self.kl_warmup <= 1, "schedule.kl_warmup", "a fraction of training", self.kl_warmup
        )
        require(
            self.start_total_concentration > 0,
            "schedule.start_total_concentration",
            "a positive number",
            self.start_total_concentration,
        )
        require(
            0 < self.start_share < 1, "schedule.start_share", "between 0 and 1", self.start_share
        )
        require(
            0 <= self.straight_through_from <= 1,
            "schedule.straight_through_from",
            "a fraction of training",
            self.straight_through_from,
        )
        require(
            0 <= self.anneal_from <= self.anneal_to <= 1,
            "schedule.anneal_from",
            "0 <= anneal_from <= anneal_to <= 1",
            (self.anneal_from, self.anneal_to),
        )
