import pytest
import torch

from bayes_router.diagnostics.figures.verdicts import plot_ranks
from bayes_router.diagnostics.measures.simulation import (
    guide_draws,
    rank_counts,
    rank_statistics,
    sampler_draws,
    uniform_p_value,
)
from tests.diagnostics.toy import BlindNetwork, MixtureNetwork, exact_posterior_mean, toy

PRIOR = torch.tensor([[1.0, 1.5]])
DRAWS = 31


def counts(guide: tuple[float, float], rows: int = 1500):
    """A blind likelihood, whose posterior is the prior."""
    program, q = toy(BlindNetwork(), PRIOR, torch.tensor([guide]))
    ranks = rank_statistics(
        program, guide_draws(program, q, DRAWS), torch.zeros(rows, 1, dtype=torch.int64)
    )
    first = ranks[ranks["expert"] == 0]
    assert len(first) == rows and first["rank"].between(0, DRAWS).all()
    return rank_counts(first["rank"], DRAWS)


def test_ranks_of_the_exact_posterior_are_uniform():
    assert uniform_p_value(counts((1.0, 1.5))) > 1e-3


def test_ranks_of_a_posterior_that_is_too_sure_heap_at_the_ends_and_of_one_too_wide_in_the_middle():
    sure, wide, low = counts((10.0, 15.0)), counts((0.3, 0.45)), counts((0.4, 3.0))
    assert min(sure[0], sure[-1]) > 2 * sure[3:5].max() and wide[2:6].min() > 1.5 * max(
        wide[0], wide[-1]
    )
    assert low[-1] > 5 * low[0]  # draws lie below the truth
    assert max(map(uniform_p_value, (sure, wide, low))) < 1e-9


def test_ranks_of_the_sampler_are_uniform_on_the_mixture():
    """Targets matter here: 300 rows are as many simulations."""
    program, _ = toy(MixtureNetwork(), PRIOR, PRIOR)
    posterior = sampler_draws(program, 15, warmup=40, thin=2, depth=4)
    ranks = rank_statistics(program, posterior, torch.zeros(300, 1, dtype=torch.int64))
    counted = rank_counts(ranks[ranks["expert"] == 0]["rank"], 15)
    assert uniform_p_value(counted) > 1e-3
    assert [bar.get_height() for bar in plot_ranks(counted).patches[:8]] == counted.tolist()


def test_what_does_not_fit_is_refused():
    program, guide = toy(BlindNetwork(), PRIOR, PRIOR)
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="posterior: expected draws of route_0"):
        rank_statistics(program, lambda tokens, targets: {}, tokens)
    with pytest.raises(ValueError, match="bins: expected a divisor of draws"):
        rank_counts(rank_statistics(program, guide_draws(program, guide, 10), tokens)["rank"], 10)


def test_the_targets_that_are_inferred_from_are_those_that_were_simulated():
    """Ranks cannot tell: inference from another row's targets is the prior on average, too.

    So here a route is nearly one expert, and the target says which.
    """
    program, _ = toy(MixtureNetwork(torch.eye(2)), torch.tensor([[0.02, 0.02]]), torch.ones(1, 2))
    seen = []

    def draws(tokens, targets):
        seen.append(targets)
        return {"route_0": torch.full((1, *tokens.shape, 2), 0.5)}

    ranks = rank_statistics(program, draws, torch.zeros(200, 1, dtype=torch.int64))
    above = ranks[ranks["rank"] == 1].sort_values("row")["expert"].to_numpy()
    assert 0.3 < above.mean() < 0.7
    assert (above == seen[0][:, 0].numpy()).mean() > 0.97


def test_the_samplers_draws_are_those_given_the_targets_of_their_row():
    program, _ = toy(MixtureNetwork(), PRIOR, PRIOR)
    targets = torch.tensor([0, 2]).repeat_interleave(60)[:, None]
    draw = sampler_draws(program, 15, warmup=20, thin=1, depth=4)
    means = draw(torch.zeros_like(targets), targets)["route_0"].mean((0, 2)).unflatten(0, (2, 60))
    exact = exact_posterior_mean(PRIOR[0], torch.tensor([0, 2]))
    torch.testing.assert_close(means.mean(1), exact, rtol=0, atol=0.06)
