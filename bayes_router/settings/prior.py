"""The sections `prior` and `schedule`: what routes cost before the text is read, and when."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Optional, Union

from bayes_router.checks import check_kinds, choose, not_negative, positive, require, unknown
from bayes_router.types import CostModel

ByUnit = tuple[Union[float, tuple[float, ...]], ...]
"""A number for each layer, `[L]`, or for each unit of each layer, `[L][R]`."""
ExpertsByUnit = tuple[tuple[Union[float, tuple[float, ...]], ...], ...]
"""A number for each expert in each layer, `[L][E]`, or in each unit of each, `[L][R][E]`."""


@dataclass(frozen=True)
class PriorConfig:
    """The compute-aware prior.

    Dirichlet(total_concentration * mean(cost)) for every token and layer. What begins with `layer`
    is given by layer, or by layer and unit of routing (nested lists): heads that are worth full
    attention, or expected to be, by hand.

    Attributes:
        cost: where cost ratios come from: paper, flops or latency.
        cost_ratio: cost ratios by hand, one an expert, full = 1; overrides `cost`.
        map: from cost ratio to prior mean: boltzmann, inverse or uniform.
        temperature: of the Boltzmann map; small means cheap.
        total_concentration: sum of the concentration; below 1 draws are nearly one-hot.
        price: nats per unit of cost ratio by which the prior is tilted, density times exp(-price *
            cost . route).
        layer_mean: prior mean by hand, one probability an expert, `[L][E]` or `[L][R][E]`;
            overrides the map.
        layer_temperature: temperatures instead of one for all, `[L]` or `[L][R]`.
        layer_total_concentration: total concentrations instead of one for all, `[L]` or `[L][R]`.
        layer_cost_ratio: what the prior charges for the experts, by its map and its tilt, `[L][E]`
            or `[L][R][E]`; what is executed is counted by the experts' own costs.
        layer_price_ratio: by which `price` is multiplied, `[L]` or `[L][R]`; a fit that holds a
            budget moves `price` and leaves these.
    """

    cost: str = "paper"
    cost_ratio: Optional[tuple[float, ...]] = None
    map: str = "boltzmann"
    temperature: float = 0.3
    total_concentration: float = 0.5
    price: float = 10.0
    layer_mean: Optional[ExpertsByUnit] = None
    layer_temperature: Optional[ByUnit] = None
    layer_total_concentration: Optional[ByUnit] = None
    layer_cost_ratio: Optional[ExpertsByUnit] = None
    layer_price_ratio: Optional[ByUnit] = None

    def __post_init__(self) -> None:
        """Check every field that does not need the experts."""
        check_kinds(self, "prior.")
        choose("prior.cost", self.cost, CostModel)
        for name in ("temperature", "total_concentration"):
            require(
                getattr(self, name) > 0, f"prior.{name}", "a positive number", getattr(self, name)
            )
        for name, of_each in self.by_layer().items():
            require(min(_flat(of_each), default=0) > 0, name, "positive numbers", of_each)
        not_negative("prior.price", self.price, "0 or more nats per unit of cost")

    def by_layer(self) -> dict[str, Any]:
        """The fields that differ by layer or unit, by name; those alone that are given."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            f"prior.{name}": value
            for name, value in given.items()
            if name.startswith("layer_") and value is not None
        }

    def check_shapes(self, num_layers: int, num_experts: int, num_units: int) -> None:
        """See that what is given by layer or unit fits a network.

        Raises:
            ValueError: it does not; the message names the field and the shapes that fit.
        """
        for name, value in self.by_layer().items():
            of_experts = name.endswith(("mean", "cost_ratio"))
            end = (num_experts,) if of_experts else ()
            fitting = ((num_layers, *end), (num_layers, num_units, *end))
            words = " or ".join(str(list(shape)) for shape in fitting)
            require(
                _shape(value) in fitting,
                name,
                f"{num_layers} {'rows' if of_experts else 'numbers'} by layer, or by layer and "
                f"unit: shape {words}",
                f"shape {list(_shape(value))}, {value}",
            )


def _flat(values: Any) -> list[float]:
    """The numbers of nested lists."""
    return [x for one in values for x in _flat(one)] if isinstance(values, Sequence) else [values]


def _shape(values: Any) -> tuple[int, ...]:
    """Of nested lists; ends where they are ragged."""
    if not isinstance(values, Sequence):
        return ()
    inner = {_shape(one) for one in values}
    return (len(values), *(inner.pop() if len(inner) == 1 else ()))


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes over training; times are fractions of it.

    Attributes:
        kl_weight: weight of the KL in the objective at the end; 1 is the literal ELBO.
        kl_warmup: fraction over which the KL weight grows linearly from a hundredth of it.
        start_total_concentration: total concentration of the prior before annealing (soft routes).
        start_experts: the expert that each layer's prior favours before annealing, cycled over
            layers, or one for each of its units, as in `full,local,local,local`; empty starts with
            the compute-aware prior.
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
        check_kinds(self, "schedule.")
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

    def check_experts(self, experts: Sequence[str], num_units: int) -> None:
        """See that `start_experts` names experts, one for a layer or one for each of its units.

        Raises:
            ValueError: it does not.
        """
        for names in self.start_experts:
            of_units = names.split(",")
            for name in of_units:
                if name not in experts:
                    raise unknown("schedule.start_experts", name, experts)
            require(
                len(of_units) in (1, num_units),
                "schedule.start_experts",
                f"one expert for a layer, or one for each of its {num_units} units (route_by)",
                names,
            )
