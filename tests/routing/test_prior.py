"""The prior's known answers.

Targets met and checked by sampling, the tilt against quadrature, bad targets refused.
"""

import math

import pytest
import torch
from torch.distributions import Beta, Dirichlet

from bayes_router.routing.posterior import categorical_entropy, expected_entropy
from bayes_router.routing.prior import PRIOR_MAPS, ComputeAwarePrior
from bayes_router.routing.tilt import sample_tilted, tilted_moments

COSTS = (1.0, 0.15, 0.3)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    values = values.double()
    return float(values.mean()), float(values.std()) / values.numel() ** 0.5


@pytest.mark.parametrize("map_", ["boltzmann", "inverse"])
@pytest.mark.parametrize(
    ("price", "target"), [(0.0, 0.16), (0.0, 0.25), (0.0, 0.45), (3.0, 0.25), (10.0, 0.19)]
)
def test_target_cost_is_met_analytically_and_by_sampling(
    map_: str, price: float, target: float
) -> None:
    prior = ComputeAwarePrior.for_target_cost(
        COSTS, 2, target, map=map_, price=price, total_concentration=0.7
    )
    assert prior.map == map_ and prior.num_layers == 2
    assert prior.total_concentration == (0.7, 0.7)
    assert prior.prior_predictive(price).cost == pytest.approx(target, abs=1e-5)
    torch.manual_seed(0)
    mean, error = mean_and_error(prior.sample(20_000, price) @ torch.tensor(COSTS))
    assert abs(mean - target) < 5 * error


@pytest.mark.parametrize(
    ("price", "cost", "entropy"),
    [(0.0, 0.25, 0.1), (0.0, 0.4, 0.9), (2.0, 0.25, 0.3), (10.0, 0.25, 0.6)],
)
def test_cost_and_entropy_are_met_together(price: float, cost: float, entropy: float) -> None:
    prior = ComputeAwarePrior.for_target_cost(COSTS, 1, cost, target_entropy=entropy, price=price)
    predictive = prior.prior_predictive(price)
    assert predictive.cost == pytest.approx(cost, abs=1e-4)
    assert predictive.expected_entropy == pytest.approx(entropy, abs=1e-4)
    torch.manual_seed(0)
    mean, error = mean_and_error(categorical_entropy(prior.sample(20_000, price).double()))
    assert abs(mean - entropy) < 5 * error


def test_boltzmann_temperature_of_two_experts_in_closed_form() -> None:
    # mean cost 0.4 of costs 1 and 0.2 puts 1/4 on full: exp(-(1 - 0.2) / temperature) = (1/4) /
    # (3/4)
    prior = ComputeAwarePrior.for_target_cost((1.0, 0.2), 1, 0.4)
    assert prior.temperature[0] == pytest.approx(0.8 / math.log(3), rel=1e-4)
    torch.testing.assert_close(prior.mean, torch.tensor([[0.25, 0.75]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", [0.149, 0.05, 0.5, 1.0, float("nan")])
def test_unreachable_cost_is_refused_with_its_range(target: float) -> None:
    with pytest.raises(
        ValueError, match=r"target_cost: expected a number from 0\.151\d to 0\.4833.*; got"
    ):
        ComputeAwarePrior.for_target_cost(COSTS, 4, target)


def test_refusals_name_the_range_under_a_price_and_the_fix() -> None:
    with pytest.raises(
        ValueError, match=r"from 0\.150\d to 0\.206\d.*got 0\.25; .*lower the price"
    ):
        ComputeAwarePrior.for_target_cost(COSTS, 1, 0.25, price=10.0)
    with pytest.raises(
        ValueError, match=r"target_entropy: expected a number from 0\.\d+ to 0\.8384.*got 2\.0"
    ):
        ComputeAwarePrior.for_target_cost(COSTS, 1, 0.25, target_entropy=2.0)
    with pytest.raises(
        ValueError, match="total_concentration: expected None beside target_entropy"
    ):
        ComputeAwarePrior.for_target_cost(
            COSTS, 1, 0.25, target_entropy=0.2, total_concentration=1.0
        )
    with pytest.raises(ValueError, match=r"from 0\.4833 to 0\.4833"):
        ComputeAwarePrior.for_target_cost(COSTS, 1, 0.25, map="uniform")
    with pytest.raises(ValueError, match=r"cost_ratio: expected numbers in \(0, 1\]"):
        ComputeAwarePrior.for_target_cost((1.0, 3.9), 1, 0.25)


def test_tilt_of_two_experts_equals_direct_quadrature() -> None:
    a, price = (
        torch.tensor([0.8, 2.5], dtype=torch.float64),
        torch.tensor([6.0, 0.9], dtype=torch.float64),
    )
    x = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    weight = (Beta(*a, validate_args=False).log_prob(x) - price[0] * x - price[1] * (1 - x)).exp()
    route = torch.stack([x, 1 - x], -1)
    found = tilted_moments(a, price)
    z = weight.mean()
    assert float(found.log_normaliser) == pytest.approx(float(z.log()), abs=1e-4)
    torch.testing.assert_close(found.mean, (weight[:, None] * route).mean(0) / z, atol=1e-4, rtol=0)
    entropy = (weight * categorical_entropy(route)).mean() / z
    assert float(found.expected_entropy) == pytest.approx(float(entropy), abs=1e-4)


@pytest.mark.parametrize("total", [1e-3, 0.05, 0.5, 5.0, 300.0, 1e4])
def test_a_price_equal_for_all_changes_nothing_but_the_normaliser(total: float) -> None:
    a = total * torch.tensor([[0.05, 0.7, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64)
    found = tilted_moments(a, torch.full((3,), 2.0))
    torch.testing.assert_close(
        found.log_normaliser, torch.full((2,), -2.0, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(found.mean, a / a.sum(-1, keepdim=True), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.expected_entropy, expected_entropy(a), atol=1e-9, rtol=0)


@pytest.mark.parametrize("total", [0.05, 1.0, 40.0])
@pytest.mark.parametrize("price", [2.0, 60.0, -8.0])
def test_tilted_draws_agree_with_tilted_moments_and_reweighted_draws(
    total: float, price: float
) -> None:
    torch.manual_seed(0)
    a, costs = total * torch.tensor([0.2, 0.5, 0.3]), price * torch.tensor(COSTS)
    found, draws = tilted_moments(a, costs), sample_tilted(a, costs, 20_000)
    assert draws.shape == (20_000, 3)
    torch.testing.assert_close(draws.sum(-1), torch.ones(20_000, dtype=torch.float64))
    error = draws.std(0) / len(draws) ** 0.5 + 1e-9
    assert ((draws.mean(0) - found.mean).abs() < 5 * error).all()
    mean, spread = mean_and_error(categorical_entropy(draws))
    assert abs(mean - float(found.expected_entropy)) < 5 * spread + 1e-9
    weight = (-(Dirichlet(a.double()).sample(torch.Size([100_000])) @ costs.double())).exp()
    z, error_z = mean_and_error(weight)
    assert abs(z - float(found.log_normaliser.exp())) < 5 * error_z


def test_prior_predictive_without_price_is_the_limit_of_a_small_one() -> None:
    prior = ComputeAwarePrior(COSTS, 3, (0.2, 1.0, 5.0), (0.1, 0.3, 2.0))
    plain, tilted = prior.prior_predictive(), prior.prior_predictive(1e-9)
    torch.testing.assert_close(plain.load, tilted.load, atol=1e-5, rtol=0)
    for name in ("cost", "entropy_of_mean", "expected_entropy"):
        assert getattr(plain, name) == pytest.approx(getattr(tilted, name), abs=1e-5)
    assert prior.prior_predictive(4.0).cost < plain.cost < prior.prior_predictive(-4.0).cost
    assert prior.sample(7).shape == prior.sample(7, 4.0).shape == (7, 3, 3)


@pytest.mark.parametrize("name", sorted(PRIOR_MAPS))
def test_maps_give_distributions_that_favour_the_cheap(name: str) -> None:
    mean = PRIOR_MAPS[name](torch.tensor(COSTS), 0.3)
    assert float(mean.sum()) == pytest.approx(1)
    assert mean[1] >= mean[2] >= mean[0]


def test_constructor_refuses_what_it_cannot_use() -> None:
    for arguments, message in (
        (((0.0, 0.0), 1), "not all zero"),
        (
            ((1.0, 0.2), 2, (0.5,)),
            "total_concentration: expected one number, or one for each of 2 layers",
        ),
        (((1.0, 0.2), 1, -1.0), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            ComputeAwarePrior(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="boltzmann, inverse, uniform"):
        ComputeAwarePrior(COSTS, 1, map="linear")
    with pytest.raises(ValueError, match="layer_mean"):
        ComputeAwarePrior(COSTS, 1, layer_mean=[[0.5, 0.2, 0.2]])


def test_each_unit_has_the_prior_that_it_would_have_alone() -> None:
    by_unit = {
        "total_concentration": ((0.2, 1.0), (5.0, 0.7)),
        "temperature": ((0.1, 0.3), (2.0, 0.5)),
        "layer_cost_ratio": (((1.0, 0.1, 0.2), (0.5, 0.4, 0.3)), (COSTS, (0.9, 0.2, 0.6))),
        "layer_price_ratio": ((1.0, 4.0), (0.25, 2.0)),
    }
    prior = ComputeAwarePrior(COSTS, 2, price=3.0, **by_unit)  # type: ignore[arg-type]
    assert prior.num_units == 2 and prior.mean.shape == (2, 2, 3)
    moments = tilted_moments(prior.concentration, prior.tilt)
    torch.manual_seed(0)
    drawn = prior.sample(20_000)
    for layer in range(2):
        for unit in range(2):
            total, temperature, costs, times = (v[layer][unit] for v in by_unit.values())
            alone = ComputeAwarePrior(costs, 1, total, temperature, price=3.0 * times)  # type: ignore
            torch.testing.assert_close(prior.concentration[layer, unit], alone.concentration[0])
            torch.testing.assert_close(prior.tilt[layer, unit], alone.tilt)
            torch.testing.assert_close(
                moments.mean[layer, unit], tilted_moments(alone.concentration, alone.tilt).mean[0]
            )
            error = drawn[:, layer, unit].std(0) / len(drawn) ** 0.5
            away = (drawn[:, layer, unit].mean(0) - moments.mean[layer, unit]).abs()
            assert bool((away < 5 * error + 1e-6).all())
    assert prior.prior_predictive().cost == pytest.approx(
        float((moments.mean @ torch.tensor(COSTS).double()).mean())
    )


def test_what_is_by_layer_holds_for_the_units_that_something_else_tells_apart() -> None:
    prior = ComputeAwarePrior(
        COSTS, 2, (0.5, 2.0), layer_mean=(((0.2, 0.3, 0.5), (0.6, 0.2, 0.2)),) * 2
    )
    torch.testing.assert_close(prior.concentration[1, 1], 2.0 * torch.tensor([0.6, 0.2, 0.2]))
    with pytest.raises(ValueError, match=r"prior: expected as many units .* got \[2, 3\]"):
        ComputeAwarePrior(COSTS, 1, ((0.5, 2.0),), layer_price_ratio=((1.0, 2.0, 3.0),))
