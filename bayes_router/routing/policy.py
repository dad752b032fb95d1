"""From a posterior over routes to the route that is executed.

A draw, the mean, or one expert a token by a policy.

The hard route is a decision after inference, not a latent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import require, unknown
from bayes_router.config import SURE_ENOUGH
from bayes_router.routing.posterior import posterior_mean, probability_of_largest
from bayes_router.types import RoutingMode


class Policy(Protocol):
    """Chooses one expert for each unit of a token."""

    def __call__(self, concentration: Tensor) -> Tensor:
        """Concentration [..., E] -> hard_choice int64 [...]."""
        ...


_REGISTRY: dict[str, type[Any]] = {}
PolicyType = TypeVar("PolicyType", bound=type[Any])


def register_policy(name: str) -> Callable[[PolicyType], PolicyType]:
    """Class decorator: names a policy for `evaluate --policy` and saved patches.

    It decorates a frozen dataclass that is a `Policy`, whose fields are numbers, names or tuples of
    them: those are saved. With the fields `cost_ratio` and `price` a budget can be met within it
    (`at_price`).

    Raises:
        TypeError: the class is no frozen dataclass.
        ValueError: the name is taken by another class.
    """

    def register(kind: PolicyType) -> PolicyType:
        if not is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise TypeError(
                f"register_policy: expected a frozen dataclass; got {kind!r}; put "
                f"@dataclass(frozen=True) below"
            )
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != kind.__qualname__:
            raise ValueError(
                f"register_policy: {name!r} is already {known.__module__}.{known.__qualname__}; "
                f"take another name"
            )
        _REGISTRY[name] = kind
        return kind

    return register


def policy_class(name: str) -> type[Any]:
    """The class registered under `name`.

    Raises:
        ValueError: no such policy; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise unknown("policy", name, _REGISTRY)
    return _REGISTRY[name]


def policy_settings(name: str) -> tuple[str, ...]:
    """What a registered policy can be told beside the costs and the price."""
    return tuple(
        field.name
        for field in fields(policy_class(name))
        if field.name not in ("cost_ratio", "price")
    )


def at_price(name: str, cost_ratio: Sequence[float], **settings: Any) -> Callable[[float], Policy]:
    """Price -> the registered policy at it: the family that a budget is met within.

    Of `argmax`, that is `Budget`.

    Raises:
        ValueError: no such policy, one without a price, or a setting that it does not have.
    """
    kind = policy_class(name)
    kind = getattr(kind, "at_a_price", kind)
    own = {field.name for field in fields(kind)}
    require(
        {"cost_ratio", "price"} <= own, "policy", "one with the fields cost_ratio and price", name
    )
    for key in settings:
        require(
            key in own,
            f"policy.{key}",
            f"a field of {kind.__name__}, {', '.join(sorted(own))}",
            key,
        )
    missing = [
        f.name
        for f in fields(kind)
        if f.default is MISSING and f.name != "cost_ratio" and f.name not in settings
    ]
    require(
        not missing,
        "policy",
        f"one that its price makes; {name} wants {', '.join(missing)} too",
        name,
        "set_guard sets one",
    )
    costs = tuple(map(float, cost_ratio))
    return lambda price: kind(cost_ratio=costs, price=price, **settings)


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """The name and the fields of a registered policy, as they are saved.

    Raises:
        ValueError: it is not registered.
    """
    for name, kind in _REGISTRY.items():
        if type(policy) is kind:
            return {"name": name, **asdict(policy)}  # type: ignore[call-overload]
    known = ", ".join(sorted(_REGISTRY))
    raise ValueError(
        f"policy: expected one of {known}, which can be saved; got {type(policy).__name__}; "
        f"register_policy it, or set another"
    )


def policy_from_dict(saved: dict[str, Any]) -> Policy:
    """The policy that `policy_to_dict` described; before 0.2 names were those of the classes."""
    settings = {key: _tuples(value) for key, value in saved.items() if key != "name"}
    policy: Policy = policy_class(str(saved["name"]).lower())(**settings)
    return policy


def _tuples(value: Any) -> Any:
    """Lists, and lists in them, as the tuples that they were before they were saved."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


Costs = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""Of the experts [E], or of the experts by unit [R][E]."""


def check_costs(cost_ratio: Costs, price: float) -> None:
    """Refuse what is no cost of experts, or no price."""
    flat = np.ravel(np.asarray(cost_ratio, dtype=object))
    numbers = [one for one in flat if isinstance(one, Real) and math.isfinite(one)]
    each = not isinstance(cost_ratio, Real) and 0 < len(numbers) == len(flat)
    require(each, "policy.cost_ratio", "a number an expert", cost_ratio)
    finite = isinstance(price, Real) and math.isfinite(price)
    require(finite, "policy.price", "a finite number", price)


def check_fit(cost_ratio: Costs, concentration: Tensor) -> None:
    """Refuse costs of other experts, or of other units, than a concentration [..., R, E] has."""
    *units, experts = np.shape(cost_ratio)
    E, R = concentration.shape[-1], concentration.shape[-2] if concentration.dim() > 1 else 1
    require(experts == E, "policy.cost_ratio", f"{E}, one an expert", cost_ratio)
    require(units in ([], [R]), "policy.cost_ratio", f"one row, or one a unit, {R}", cost_ratio)


def like(values: Costs, x: Tensor, factor: float = 1.0) -> Tensor:
    """`factor` times `values`, in the dtype and on the device of x.

    Kept there, as a copy from the host waits for a GPU.
    """
    return _kept(values, factor, x.dtype, x.device)


@lru_cache(maxsize=256)
def _kept(values: Costs, factor: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made there could not be used elsewhere
        return (factor * torch.tensor(values, dtype=torch.float64)).to(device, dtype)


def priced(concentration: Tensor, cost_ratio: Costs, price: float) -> Tensor:
    """The concentration whose mean is proportional to mean x exp(-price x cost), at the same total.

    [..., E].

    `price` in nats per unit of cost ratio: what a token must be surer of the dearer expert to take
    it. 0 changes nothing.
    """
    if price == 0:
        return concentration
    return tilted_by(concentration, like(cost_ratio, concentration, price))


def tilted_by(concentration: Tensor, tilt: Tensor) -> Tensor:
    """The concentration whose mean is proportional to mean x exp(-tilt), at the same total.

    [..., E].
    """
    share = (concentration.log() - tilt).softmax(-1)
    # an underflowed concentration is no concentration
    least = torch.finfo(concentration.dtype).tiny
    return (share * concentration.sum(-1, keepdim=True)).clamp_min(least)


@register_policy("conservative")
@dataclass(frozen=True)
class Conservative:
    """Argmax, but a token that is unsure takes the stronger expert.

    Where the posterior probability that the argmax is the largest weight falls below `threshold`,
    the token takes the costliest expert whose posterior mean is at least `least_mean` (cost stands
    for strength).

    `price` moves the posterior first, see `priced`: so that a budget can be met, as `Budget` meets
    one by argmax.
    """

    cost_ratio: Costs
    threshold: float = SURE_ENOUGH
    least_mean: float = 0.05
    price: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require(0 <= self.threshold <= 1, "policy.threshold", "a probability", self.threshold)
        check_costs(self.cost_ratio, self.price)
        require(0 <= self.least_mean <= 1, "policy.least_mean", "a probability", self.least_mean)

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        check_fit(self.cost_ratio, concentration)
        concentration = priced(concentration, self.cost_ratio, self.price)
        best = concentration.argmax(-1)
        sure = probability_of_largest(concentration, best) >= self.threshold
        cost = like(self.cost_ratio, concentration)
        plausible = posterior_mean(concentration) >= self.least_mean
        strongest = torch.where(plausible, cost, -1.0).argmax(-1)
        return torch.where(sure, best, strongest)


@register_policy("budget")
@dataclass(frozen=True)
class Budget:
    """argmax of log posterior mean - price x cost: one trained model, many budgets.

    `price` in nats per unit of cost ratio. 0 is argmax; a negative price spends more than that, up
    to every token on the costliest expert.
    """

    cost_ratio: Costs
    price: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_costs(self.cost_ratio, self.price)

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`.

        The log of the total concentration is the same for all experts, and left out.
        """
        check_fit(self.cost_ratio, concentration)
        paid = like(self.cost_ratio, concentration, self.price)
        return (concentration.log() - paid).argmax(-1)


@register_policy("argmax")
@dataclass(frozen=True)
class Argmax:
    """The expert of largest posterior mean."""

    at_a_price: ClassVar[type[Any]] = Budget  # argmax itself has no costs

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        return concentration.argmax(-1)


def check_policy(policy: object) -> None:
    """Refuse what is no policy."""
    ok = callable(policy) and not isinstance(policy, type)
    fix = "set one, such as Argmax() or Budget(cost_ratio, price)"
    require(ok, "policy", "a policy: concentration -> choices", policy, fix)


def execute(
    posterior: Dirichlet, mode: RoutingMode, policy: Policy, alarm: Tensor | None = None
) -> Tensor:
    """The route of every token: weights [..., E] for SAMPLE and MEAN, choices int64 [...] for HARD.

    `alarm` [B, T] is what a guard decided of the text (`routing.guard`); None under any other
    policy.
    """
    if mode is RoutingMode.SAMPLE:
        return posterior.rsample()
    if mode is RoutingMode.MEAN:
        return posterior_mean(posterior.concentration)
    guard: Any = policy
    check_policy(policy)
    choice: Tensor = (
        policy(posterior.concentration) if alarm is None else guard(posterior.concentration, alarm)
    )
    made = getattr(choice, "dtype", type(choice).__name__)
    require(made == torch.int64, "policy", "choices int64, one a token and unit", made)
    wanted = posterior.concentration.shape[:-1]
    fits = choice.shape in (wanted, wanted[:-1])  # without units: of all of them
    require(fits, "policy", f"choices {tuple(wanted)}", tuple(choice.shape))
    return choice
