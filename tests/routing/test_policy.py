"""Policies: where conservative falls back, how a price moves a token, what execute returns."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet

import bayes_router.routing.guard  # noqa: F401, registers it
from bayes_router.routing import policy as registry
from bayes_router.routing import posterior
from bayes_router.routing.policy import (
    Argmax,
    Budget,
    Conservative,
    Policy,
    at_price,
    execute,
    like,
    policy_from_dict,
    policy_settings,
    policy_to_dict,
    priced,
    register_policy,
)
from bayes_router.routing.posterior import posterior_mean, probability_of_largest
from bayes_router.types import RoutingMode
from tests.operators import Operators

COSTS = (1.0, 0.15, 0.3)


def concentrations(n: int = 400, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)).square() * 6 + 0.02


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("price", [0.0, 2.0, -2.0])
def test_conservative_falls_back_exactly_where_it_is_unsure(threshold: float, price: float) -> None:
    concentration = concentrations()
    shifted = priced(concentration, COSTS, price)
    best = shifted.argmax(-1)
    unsure = probability_of_largest(shifted, best) < threshold
    choice = Conservative(COSTS, threshold, least_mean=0.1, price=price)(concentration)
    assert torch.equal(choice[~unsure], best[~unsure])
    cost, mean = torch.tensor(COSTS), posterior_mean(shifted)
    for token in unsure.nonzero().flatten().tolist():
        plausible = [e for e in range(3) if mean[token, e] >= 0.1]
        assert choice[token] == max(plausible, key=lambda e: float(cost[e]))
    if 0.5 <= threshold < 1:
        assert 0 < int(unsure.sum()) < len(unsure)


def test_conservative_by_hand() -> None:
    sure, unsure, far = [0.02, 9.0, 0.5], [0.9, 1.0, 0.9], [0.001, 1.0, 0.9]
    choice = Conservative(COSTS, 0.7)(torch.tensor([sure, unsure, far]))
    # the last: full is implausible, local is the strongest that is not
    assert choice.tolist() == [1, 0, 2]


def test_conservative_without_threshold_is_the_budget_policy() -> None:
    concentration = concentrations()
    for price in (-3.0, 0.0, 5.0):
        assert torch.equal(
            Conservative(COSTS, 0.0, price=price)(concentration),
            Budget(COSTS, price)(concentration),
        )


def test_priced_keeps_the_total_and_moves_the_odds_by_the_price() -> None:
    concentration = concentrations().double()
    assert priced(concentration, COSTS, 0.0) is concentration
    moved = priced(concentration, COSTS, 3.0)
    torch.testing.assert_close(moved.sum(-1), concentration.sum(-1))
    odds = (moved[:, 0] / moved[:, 1]).log() - (concentration[:, 0] / concentration[:, 1]).log()
    torch.testing.assert_close(odds, torch.full_like(odds, -3.0 * 0.85))
    assert (priced(concentration.float(), COSTS, 1e4) > 0).all()


def test_a_price_trades_one_nat_of_log_mean_for_one_over_price_of_cost() -> None:
    # log(0.6 / 0.4) = 0.405 over a cost difference of 0.85: the token changes at 0.477
    concentration = torch.tensor([[6.0, 4.0, 0.1]])
    assert Budget(COSTS, 0.47)(concentration).item() == 0
    assert Budget(COSTS, 0.48)(concentration).item() == 1


def test_budget_goes_from_the_costliest_to_the_cheapest() -> None:
    concentration, cost = concentrations(), torch.tensor(COSTS)
    paid = [
        float(cost[Budget(COSTS, price)(concentration)].mean())
        for price in (-100.0, -3.0, 0.0, 3.0, 100.0)
    ]
    assert paid[0] == 1.0
    assert paid[-1] == pytest.approx(0.15)
    assert paid == sorted(paid, reverse=True)
    assert torch.equal(Budget(COSTS, 0.0)(concentration), Argmax()(concentration))


@pytest.mark.parametrize(("name", "kind"), [("argmax", Budget), ("conservative", Conservative)])
def test_families_by_name(name: str, kind: type) -> None:
    settings = {"threshold": 0.8} if "threshold" in policy_settings(name) else {}
    made: Policy = at_price(name, torch.tensor(COSTS).tolist(), **settings)(1.5)
    assert isinstance(made, kind) and made.price == 1.5  # type: ignore[attr-defined]
    assert hash(made) is not None and getattr(made, "threshold", 0.8) == 0.8


def test_a_family_refuses_what_it_does_not_have() -> None:
    with pytest.raises(
        ValueError,
        match="policy: expected one of argmax, budget, conservative, guard; got 'argmin'",
    ):
        at_price("argmin", COSTS)
    with pytest.raises(
        ValueError,
        match=r"policy.threshold: expected a field of Budget, cost_ratio, price; got 'threshold'",
    ):
        at_price("argmax", COSTS, threshold=0.5)
    with pytest.raises(
        ValueError,
        match="policy: expected one that its price makes; guard wants refuge, usual, level",
    ):
        at_price("guard", COSTS)


@pytest.mark.parametrize(
    "policy", [Argmax(), Budget(COSTS, 1.5), Conservative(COSTS, 0.8, 0.1, 2.0)]
)
def test_a_policy_is_saved_by_its_name(policy: Policy) -> None:
    saved = json.loads(json.dumps(policy_to_dict(policy)))
    assert saved["name"] == type(policy).__name__.lower() and policy_from_dict(saved) == policy
    # as patches of 0.1 have it
    assert policy_from_dict({**saved, "name": type(policy).__name__}) == policy


def test_a_registered_policy_is_as_good_as_the_librarys() -> None:
    @dataclass(frozen=True)
    class Nearest:
        """The expert whose cost is nearest to `price`."""

        cost_ratio: tuple[float, ...]
        price: float = 0.0

        def __call__(self, concentration: Tensor) -> Tensor:
            distance = (torch.tensor(self.cost_ratio) - self.price).abs()
            return distance.argmin().expand(concentration.shape[:-1])

    with pytest.raises(
        ValueError,
        match="one of argmax, budget, conservative, guard, which can be saved; got Nearest",
    ):
        policy_to_dict(Nearest(COSTS))
    with pytest.raises(
        ValueError,
        match="'budget' is already bayes_router.routing.policy.Budget; take another name",
    ):
        register_policy("budget")(Nearest)
    with pytest.raises(TypeError, match="expected a frozen dataclass"):
        register_policy("loose")(type("Loose", (), {}))
    register_policy("nearest")(Nearest)
    try:
        made = at_price("nearest", COSTS)(0.25)
        assert (
            made(concentrations(3)).tolist() == [2, 2, 2]
            and policy_from_dict(policy_to_dict(made)) == made
        )
    finally:
        del registry._REGISTRY["nearest"]


def test_refused_fields() -> None:
    for fields in ({"threshold": 1.5}, {"least_mean": -0.1}):
        with pytest.raises(ValueError, match="a probability"):
            Conservative(COSTS, **fields)


UNITS = ((1.0, 0.15, 0.3), (1.0, 0.4, 0.1))


@pytest.mark.parametrize("policy", [Budget(UNITS, 2.0), Conservative(UNITS, price=1.0)])
def test_costs_by_unit_are_saved_and_are_of_as_many_units(policy: Any) -> None:
    """Each unit decides as under its own costs; what JSON makes lists of comes back as it was."""
    q = concentrations(7).unsqueeze(1).repeat(1, 2, 1)  # [N, R, E]
    again = policy_from_dict(json.loads(json.dumps(policy_to_dict(policy))))
    assert again == policy
    alone = [replace(policy, cost_ratio=costs)(q[:, u]) for u, costs in enumerate(UNITS)]
    assert torch.equal(again(q), torch.stack(alone, 1))
    for wrong in (q[:, :1].repeat(1, 3, 1), q[..., :2]):
        with pytest.raises(ValueError, match="^policy.cost_ratio: expected"):
            policy(wrong)


@pytest.mark.parametrize("costs", [0.6, (), (1.0, "a"), ((1.0, 0.2), (1.0,))])
def test_what_is_no_cost_of_experts_is_refused(costs: Any) -> None:
    """A bare number among them, such as a threshold in the first place."""
    for kind in (Budget, Conservative):
        with pytest.raises(ValueError, match="^policy.cost_ratio: expected a number an expert"):
            kind(costs)


def test_execute() -> None:
    posterior = Dirichlet(concentrations(5))
    torch.manual_seed(0)
    draw = execute(posterior, RoutingMode.SAMPLE, Argmax())
    torch.testing.assert_close(draw.sum(-1), torch.ones(5))
    torch.testing.assert_close(execute(posterior, RoutingMode.MEAN, Argmax()), posterior.mean)
    assert torch.equal(execute(posterior, RoutingMode.HARD, Argmax()), posterior.mean.argmax(-1))


def test_a_price_makes_no_policy_that_wants_more() -> None:
    with pytest.raises(
        ValueError,
        match="policy: expected one that its price makes; guard wants refuge, usual, level",
    ):
        at_price("guard", COSTS)


@pytest.mark.parametrize(
    "policy", [Argmax(), Budget(COSTS, 1.5), Conservative(COSTS, 0.7, price=1.0)]
)
def test_a_policy_brings_its_constants_to_the_device_once(policy: Policy) -> None:
    """Numbers of the host that become a tensor.

    On a GPU each such copy waits for all that runs there.
    """
    concentration = concentrations()
    policy(concentration)
    with Operators() as seen:
        policy(concentration)
    assert "aten.argmax.default" in seen.names and "aten.lift_fresh.default" not in seen.names


def test_constants_kept_in_inference_mode_serve_gradients() -> None:
    """A tensor made in inference mode cannot be saved for a backward pass."""
    costs = (1.0, 0.1234, 0.5678)
    posterior._gauss_legendre.cache_clear()
    with torch.inference_mode():
        Conservative(costs)(concentrations())
    concentration = concentrations().requires_grad_()
    (like(costs, concentration) * concentration).sum().backward()
    assert concentration.grad is not None and bool(
        (concentration.grad == torch.tensor(costs)).all()
    )
    assert probability_of_largest(concentration, concentration.argmax(-1)).requires_grad
