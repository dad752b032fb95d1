"""Closed forms of the Dirichlet against sampling, quadrature and torch's own."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Dirichlet, Gamma, kl_divergence

from bayes_router.routing.controller import MetaController
from bayes_router.routing.posterior import (
    categorical_entropy,
    dirichlet_kl,
    entropy_of_mean,
    expected_entropy,
    mutual_information,
    posterior,
    posterior_mean,
    probability_of_largest,
    route_information,
)

CASES = [
    [0.05, 0.02, 0.03],
    [0.5, 0.2, 0.1],
    [3.0, 2.0, 2.9],
    [1000.0, 990.0, 10.0],
    [1e-2, 1e-2, 1e-2],
    [1e4, 1e-3, 2.0],
]


def log_gammas(concentration: Tensor, draws: int) -> Tensor:
    """log Gamma(a) = log Gamma(a + 1) + log(U) / a: exact where a draw itself would underflow."""
    gamma = Gamma(concentration + 1, torch.ones_like(concentration)).sample(torch.Size([draws]))
    return (
        gamma.log()
        + torch.rand(draws, len(concentration), dtype=torch.float64).log() / concentration
    )


@pytest.mark.parametrize("case", CASES)
def test_probability_of_largest_is_that_of_draws(case: list[float]) -> None:
    torch.manual_seed(0)
    concentration = torch.tensor(case, dtype=torch.float64)
    stated = torch.stack([probability_of_largest(concentration, torch.tensor(e)) for e in range(3)])
    largest = log_gammas(concentration, 100_000).argmax(-1)
    observed = torch.bincount(largest, minlength=3) / 100_000
    torch.testing.assert_close(stated, observed.double(), rtol=0, atol=0.006)
    assert float(stated.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_expected_entropy_is_that_of_draws(case: list[float]) -> None:
    torch.manual_seed(0)
    concentration = torch.tensor(case, dtype=torch.float64)
    draws = log_gammas(concentration, 100_000).softmax(-1)
    assert float(expected_entropy(concentration)) == pytest.approx(
        float(categorical_entropy(draws).mean()), abs=0.005
    )


def test_information_is_total_minus_expected_uncertainty() -> None:
    concentration = torch.rand(7, 4, dtype=torch.float64) * 3 + 0.01
    total = Categorical(posterior_mean(concentration)).entropy()
    torch.testing.assert_close(entropy_of_mean(concentration), total)
    torch.testing.assert_close(
        mutual_information(concentration), total - expected_entropy(concentration)
    )
    assert bool((mutual_information(concentration) > 0).all())


def test_the_kl_is_torchs_in_value_and_gradient() -> None:
    q = (torch.rand(50, 3, dtype=torch.float64) * 4 + 0.01).requires_grad_()
    p = torch.rand(50, 3, dtype=torch.float64) * 2 + 0.01
    ours, theirs = dirichlet_kl(q, p), kl_divergence(Dirichlet(q), Dirichlet(p))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), q)[0] for x in (ours, theirs)))
    torch.testing.assert_close(
        dirichlet_kl(p, p), torch.zeros(50, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("extreme", [1e-3, 1e-2, 1e4])
def test_the_kl_and_its_gradient_are_finite_at_the_edges(extreme: float) -> None:
    q = torch.tensor([extreme, 1.0, extreme], requires_grad=True)
    kl = dirichlet_kl(q, torch.tensor([0.02, 0.3, 0.2]))
    kl.backward()
    assert bool(torch.isfinite(kl)) and float(kl) >= 0
    assert q.grad is not None and bool(torch.isfinite(q.grad).all())


def test_route_information() -> None:
    one_hot = torch.eye(3).repeat(10, 1)
    assert float(route_information(one_hot)) == pytest.approx(
        torch.tensor(3.0).log().item(), rel=1e-5
    )
    assert float(route_information(torch.full((9, 3), 1 / 3))) == pytest.approx(0.0, abs=1e-6)
    same = torch.tensor([0.7, 0.2, 0.1]).expand(9, 3)
    assert float(route_information(same)) == pytest.approx(0.0, abs=1e-6)


def test_the_posterior_is_float32_for_half_inputs_and_above_its_floor() -> None:
    q = posterior(torch.full((2, 3, 4), -50.0, dtype=torch.bfloat16), 0.02)
    assert q.concentration.dtype == torch.float32
    torch.testing.assert_close(q.concentration, torch.full((2, 3, 4), 0.02))
    assert (
        posterior(torch.zeros(1, 4, dtype=torch.float64), 0.02).concentration.dtype == torch.float64
    )


def test_a_controller_starts_where_it_is_told() -> None:
    controller = MetaController(16, 2, 3, hidden=8, floor=0.01)
    start = torch.tensor([[0.1, 0.25, 0.15], [5.0, 0.5, 2000.0]])
    controller.start_at(start)
    hidden = torch.randn(4, 7, 16)
    for layer in range(2):
        got = controller.posterior(layer, hidden).concentration
        torch.testing.assert_close(got, start[layer].expand(4, 7, 1, 3), rtol=1e-4, atol=1e-5)


def test_draws_and_their_gradient_are_finite_at_the_edges() -> None:
    for value in (1e-3, 1e-2, 1.0, 1e4):
        raw = torch.full((64, 3), value, requires_grad=True)
        draw = Dirichlet(raw, validate_args=False).rsample()
        draw.square().sum().backward()
        assert (
            bool(torch.isfinite(draw).all())
            and raw.grad is not None
            and bool(torch.isfinite(raw.grad).all())
        ), value
