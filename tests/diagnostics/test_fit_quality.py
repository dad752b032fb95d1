import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet, Gamma

from bayes_router.diagnostics.measures.amortisation import (
    amortisation_gap,
    gap_verdict,
    nuts_comparison,
)
from bayes_router.diagnostics.measures.importance import (
    draw_log_route,
    effective_sample_size,
    importance_bound,
    importance_weights,
    k_hat_limit,
    log_density_ratio,
    pareto_k,
)
from bayes_router.diagnostics.measures.k_hat import FitThresholds, k_hat_frame, k_hat_verdicts
from bayes_router.diagnostics.measures.verdict import Severity
from bayes_router.routing.posterior import dirichlet_kl
from tests.diagnostics.toy import THETA, BlindNetwork, MixtureNetwork, exact_posterior_mean, toy

TOKENS = torch.zeros(6, dtype=torch.int64)
TARGETS = torch.tensor([0, 1, 2, 2, 0, 1])


def test_log_draws_are_those_of_the_dirichlet():
    q = torch.tensor([0.5, 2.0, 0.05])
    torch.manual_seed(0)
    log_route = draw_log_route(q.expand(100_000, 3))
    expected = torch.digamma(q) - torch.digamma(q.sum())  # E[log route]
    spread = torch.polygamma(1, q) - torch.polygamma(1, q.sum())  # its variance
    assert torch.all((log_route.mean(0) - expected).abs() < 5 * (spread / 100_000).sqrt())
    assert torch.allclose(log_route.exp().sum(-1), torch.ones(100_000, dtype=torch.float64))


def test_log_draws_and_their_ratio_stay_finite_where_the_draw_underflows():
    q = torch.full((20_000, 3), 0.01)
    torch.manual_seed(0)
    log_route = draw_log_route(q)
    # a float32 draw would be zero
    assert (log_route < math.log(torch.finfo(torch.float32).tiny)).any()
    program, _ = toy(
        MixtureNetwork(torch.ones(3, 3) / 3), torch.tensor([[0.02, 0.3, 0.1]]), torch.ones(1, 3)
    )
    ratio = log_density_ratio(log_route, q, program, 0)
    assert torch.isfinite(ratio).all()
    assert float(ratio.exp().mean()) == pytest.approx(1, abs=0.1)  # E_q[p / q]


@pytest.mark.parametrize("price", [0.0, 3.0])
def test_density_ratio_is_that_of_the_log_densities(price):
    prior, q = torch.tensor([[1.5, 0.8]]), torch.tensor([2.0, 3.0])
    program, _ = toy(MixtureNetwork(), prior, q[None], price)
    torch.manual_seed(0)
    log_route = draw_log_route(q.expand(50, 2))
    route = log_route.exp().float()
    expected = program.prior(0).log_prob(route) - Dirichlet(q).log_prob(route)
    torch.testing.assert_close(
        log_density_ratio(log_route, q, program, 0).float(), expected, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (0.2, 0.8), (0.1, 1.0)])
def test_k_hat_of_one_dirichlet_for_another_is_the_closed_form(p, q):
    """Weights r^(p - q) with P(r < x) ~ x^q have the tail index 1 - p / q."""
    prior, guide = torch.tensor([[p, 3.0]]), torch.tensor([[q, 3.0]])
    program, pair = toy(BlindNetwork(), prior, guide)
    k = [
        pareto_k(
            importance_weights(
                program, pair, TOKENS[:1], TARGETS[:1], draws=4000, seed=s
            ).log_weight()
        )
        for s in range(4)
    ]
    assert np.mean(k) == pytest.approx(1 - p / q, abs=0.12)


def test_a_guide_that_is_the_posterior_has_equal_weights_and_the_exact_bound():
    prior = torch.tensor([[0.5, 0.7]])
    program, guide = toy(BlindNetwork(), prior, prior)
    weights = importance_weights(program, guide, TOKENS, TARGETS, draws=64).log_weight()
    exact = float(THETA[0, TARGETS].log().sum())
    assert pareto_k((weights - weights.mean()).round(decimals=5)) == float("-inf")
    assert importance_bound(weights, 1)[0] == pytest.approx(exact, abs=1e-4)
    assert effective_sample_size(weights) == pytest.approx(1, abs=1e-6)


def test_bounds_rise_to_the_exact_evidence():
    prior, guide = torch.tensor([[1.0, 1.5]]), torch.tensor([[1.8, 1.6]])
    program, pair = toy(MixtureNetwork(), prior, guide)
    weights = importance_weights(program, pair, TOKENS, TARGETS, draws=20_000)
    exact = float(((prior[0] / prior.sum()) @ THETA[:, TARGETS]).log().sum())
    bounds = [importance_bound(weights.log_weight(), k)[0] for k in (1, 10, 1000)]
    assert bounds[0] < bounds[1] < bounds[2] < exact + 0.02
    assert bounds[2] == pytest.approx(exact, abs=0.1) and bounds[0] < exact - 0.3


def test_the_single_draw_bound_is_the_elbo():
    prior, q = torch.tensor([[1.0, 1.5]]), torch.tensor([[2.0, 1.2]])
    program, pair = toy(MixtureNetwork(), prior, q)
    weights = importance_weights(program, pair, TOKENS, TARGETS, draws=20_000)
    mean, error = importance_bound(weights.log_weight(), 1)
    torch.manual_seed(1)
    draws = Dirichlet(q[0]).sample((50_000, 6))
    likelihood = float((draws @ THETA)[:, torch.arange(6), TARGETS].log().sum(1).mean())
    assert mean == pytest.approx(
        likelihood - 6 * float(dirichlet_kl(q[0], prior[0])), abs=5 * error + 0.02
    )


def test_a_prefix_has_the_weights_of_a_shorter_sequence():
    program, pair = toy(MixtureNetwork(), torch.tensor([[1.0, 1.5]]), torch.tensor([[2.0, 1.2]]))
    whole = importance_weights(program, pair, TOKENS, TARGETS, draws=30)
    assert torch.allclose(
        whole.log_weight(2), whole.log_ratio[:, :2].sum(1) + whole.log_likelihood[:, :2].sum(1)
    )
    assert torch.allclose(
        whole.log_weight(2, 3.0) - whole.log_weight(2), 2 * whole.log_likelihood[:, :2].sum(1)
    )


def test_verdicts_tell_a_good_guide_from_a_bad_one():
    program, bad = toy(BlindNetwork(), torch.tensor([[0.1, 1.0]]), torch.tensor([[5.0, 1.0]]))
    frame = k_hat_frame(program, bad, [(TOKENS, TARGETS)] * 2, (1, 4), draws=300, bounds=(1, 10))
    assert {"bound_1", "bound_10", "bound_10_error"} <= set(frame.columns) and set(
        frame["target"]
    ) == {"joint", "cold"}
    assert {v.severity for v in k_hat_verdicts(frame)} == {Severity.WARNING}
    program, good = toy(BlindNetwork(), torch.tensor([[2.0, 2.0]]), torch.tensor([[2.2, 2.1]]))
    frame = k_hat_frame(program, good, [(TOKENS, TARGETS)] * 2, (1, 4), draws=300, bounds=(1,))
    assert {v.severity for v in k_hat_verdicts(frame)} == {Severity.GOOD}


def test_the_limit_of_k_hat_is_the_present_one_and_the_verdict_takes_it():
    """min(1 - 1 / log10(draws), 0.7): Vehtari, Simpson, Gelman, Yao and Gabry (2024)."""
    for draws, limit in ((100, 0.5), (400, 0.6157), (1000, 2 / 3), (2154, 0.7), (10**6, 0.7)):
        assert k_hat_limit(draws) == pytest.approx(limit, abs=1e-4)
    rows = {"target": "joint", "length": 1, "draws": 100}
    for k, severity in ((0.49, Severity.GOOD), (0.51, Severity.WARNING)):
        assert k_hat_verdicts(pd.DataFrame([{**rows, "k_hat": k}]))[0].severity is severity


def test_bad_input_is_refused():
    program, guide = toy(MixtureNetwork(), torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="tokens: expected one sequence"):
        importance_weights(program, guide, TOKENS[None], TARGETS[None])
    with pytest.raises(ValueError, match="lengths: expected at most the 6 tokens"):
        k_hat_frame(program, guide, [(TOKENS, TARGETS)], (64,))
    with pytest.raises(ValueError, match="log_weight: expected finite"):
        pareto_k(torch.full((50,), float("nan")))
    with pytest.raises(ValueError, match="log_weight: expected at least 25"):
        pareto_k(torch.zeros(3))
    with pytest.raises(ValueError, match="sequences: expected at least one"):
        k_hat_frame(program, guide, [])


@pytest.mark.filterwarnings("error")
def test_weights_of_which_one_is_all_are_the_worst_there_are():
    """Log weights a thousand nats apart, as those of a prior with the price of a budget are."""
    log_weight = np.random.default_rng(1).normal(size=500)
    near = pareto_k(20 * log_weight)
    assert near > 5
    for size in (200, 500, 5000):
        assert pareto_k(size * log_weight) == pytest.approx(near * size / 20, rel=0.2)


def test_gap_of_a_blind_likelihood_is_the_kl():
    """The best concentrations are the prior's.

    So all of the controller's KL is amortisation gap.
    """
    prior, q = torch.tensor([[0.8, 1.2]]), torch.tensor([[3.0, 1.0]])
    program, guide = toy(BlindNetwork(), prior, q)
    gap = amortisation_gap(program, guide, TOKENS[None], TARGETS[None], steps=150, draws=4)
    assert gap.gap == pytest.approx(float(dirichlet_kl(q[0], prior[0])), rel=0.02)
    assert gap.kl_own < 0.01 and gap.nll_own == pytest.approx(gap.nll_controller, abs=1e-5)
    assert (
        gap_verdict(gap).severity is Severity.NOTE
        and gap_verdict(gap, FitThresholds(gap=5)).severity is Severity.GOOD
    )


def test_a_controller_at_the_optimum_has_no_gap():
    prior = torch.tensor([[0.8, 1.2]])
    program, guide = toy(BlindNetwork(), prior, prior)
    assert (
        abs(amortisation_gap(program, guide, TOKENS[None], TARGETS[None], steps=30, draws=2).gap)
        < 5e-3
    )


def test_a_gap_of_very_sure_posteriors_is_a_number():
    """Concentrations of hundreds, as fits against a price have them, are where a fit may start."""
    prior = torch.tensor([[80.0, 400.0]])
    program, guide = toy(BlindNetwork(), prior, prior)
    gap = amortisation_gap(program, guide, TOKENS[None], TARGETS[None], steps=2, draws=2)
    assert abs(gap.gap) < 0.1


def test_hindsight_raises_the_bound_of_each_token():
    """Own concentrations see which token came: 0 speaks for the first expert, 2 for the second."""
    prior = torch.tensor([[2.0, 2.0]])
    program, guide = toy(MixtureNetwork(), prior, prior)
    gap = amortisation_gap(program, guide, TOKENS[None], TARGETS[None], steps=150, draws=64)
    evidence = float(((prior[0] / prior.sum()) @ THETA[:, TARGETS]).log().mean())
    assert (
        gap.gap > 3 * gap.standard_error and gap.bound_controller < gap.bound_own < evidence + 0.02
    )


def test_the_gap_has_an_interval_over_windows():
    """Windows whose tokens speak differently gain differently; one window has no interval."""
    program, guide = toy(MixtureNetwork(), torch.tensor([[2.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    targets = torch.stack([TARGETS, torch.zeros(6, dtype=torch.int64), TARGETS])
    gap = amortisation_gap(program, guide, TOKENS.expand(3, 6), targets, steps=100, draws=32)
    assert gap.interval.n == 3 and gap.interval.value == pytest.approx(gap.gap, abs=1e-6)
    alone = [
        amortisation_gap(program, guide, TOKENS[None], one[None], steps=100, draws=32).gap
        for one in targets[:2]
    ]
    # each window's own gain is an end of the interval: all three may be of one kind
    assert gap.interval.low == pytest.approx(min(alone), abs=0.02)
    assert gap.interval.high == pytest.approx(max(alone), abs=0.02)
    text = gap_verdict(gap).text
    assert f"(95% {gap.interval.low:.3f} to {gap.interval.high:.3f}, n = 3)" in text
    between = FitThresholds(gap=(gap.gap + gap.interval.high) / 2)
    assert gap_verdict(gap, between).severity is Severity.NOTE  # not for all of the interval


def test_nuts_finds_the_exact_posterior_and_shows_what_the_guide_misses():
    prior, targets = torch.tensor([[2.0, 3.0]]), torch.tensor([[0, 2]])
    program, guide = toy(MixtureNetwork(), prior, prior)
    frame = nuts_comparison(
        program, guide, torch.zeros_like(targets), targets, draws=300, warmup=100, guide_draws=4
    )
    exact: Tensor = exact_posterior_mean(prior[0], targets)  # [1, 2, 2]
    np.testing.assert_allclose(frame["nuts"], exact.flatten(), atol=0.04)
    np.testing.assert_allclose(frame["guide"], frame["prior"], atol=1e-6)
    assert frame["difference"].abs().max() > 0.05


def test_gamma_draws_by_logs_have_the_right_mean():
    """The identity that `draw_log_route` rests on."""
    torch.manual_seed(0)
    a = torch.tensor(0.3, dtype=torch.float64)
    boosted = Gamma(a + 1, torch.tensor(1.0, dtype=torch.float64)).sample((100_000,)) * torch.rand(
        100_000
    ).double() ** (1 / a)
    assert float(boosted.mean()) == pytest.approx(0.3, abs=0.01) and float(
        boosted.var()
    ) == pytest.approx(0.3, abs=0.02)
