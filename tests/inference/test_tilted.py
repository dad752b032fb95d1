"""The tilted Dirichlet: density, moments and draws against quadrature and against one another."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chisquare, kstest
from torch import Tensor
from torch.distributions import kl_divergence

from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.tilt import tilted_kl, tilted_moments

Pair = tuple[float, ...]
CASES: list[tuple[Pair, Pair]] = [
    ((0.05, 0.3), (10.0, 1.5)),
    ((0.5, 2.0), (0.0, 7.0)),
    ((3.0, 3.0), (30.0, 1.0)),
    ((0.9, 0.4), (-4.0, 2.0)),
]


def integral(a: Pair, tilt: Pair, power: int, upto: float = 1.0) -> float:
    """int_0^upto x^power x^(a_0 - 1) (1 - x)^(a_1 - 1) exp(-tilt . (x, 1 - x)) dx.

    The ends' powers are quad's own weight.
    """

    def rest(x: float) -> float:
        return float(x**power * np.exp(-tilt[0] * x - tilt[1] * (1 - x)))

    if upto == 1.0:
        return float(quad(rest, 0, 1, weight="alg", wvar=(a[0] - 1, a[1] - 1))[0])
    return float(
        quad(lambda x: rest(x) * (1 - x) ** (a[1] - 1), 0, upto, weight="alg", wvar=(a[0] - 1, 0))[
            0
        ]
    )


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("a", "tilt"), CASES)
def test_normaliser_and_moments_are_those_of_quadrature(a: Pair, tilt: Pair) -> None:
    p = TiltedDirichlet(double(*a), double(*tilt))
    z, first, second = (integral(a, tilt, power) for power in (0, 1, 2))
    beta = float(torch.lgamma(double(*a)).sum() - torch.lgamma(double(*a).sum()))
    assert float(p.log_normaliser) == pytest.approx(np.log(z) - beta, abs=1e-7)
    assert float(p.mean[0]) == pytest.approx(first / z, abs=1e-7)
    assert float(p.variance[0]) == pytest.approx(second / z - (first / z) ** 2, abs=1e-7)
    x = 0.37
    density = x ** (a[0] - 1) * (1 - x) ** (a[1] - 1) * np.exp(-tilt[0] * x - tilt[1] * (1 - x)) / z
    assert float(p.log_prob(double(x, 1 - x))) == pytest.approx(np.log(density), abs=1e-7)


@pytest.mark.parametrize(("a", "tilt"), CASES)
def test_draws_fit_the_density_of_two_experts(a: Pair, tilt: Pair) -> None:
    """Kolmogorov and Smirnov against the distribution function by quadrature, at 240 points."""
    torch.manual_seed(0)
    draws = TiltedDirichlet(double(*a), double(*tilt)).sample(torch.Size([4000]))[:, 0].numpy()
    edge = np.logspace(-12, -2, 80)
    knots = np.concatenate([edge, np.linspace(0.011, 0.989, 80), 1 - edge[::-1]])
    whole = integral(a, tilt, 0)
    known = np.array(
        [
            integral(a, tilt, 0, x) if x < 0.5 else whole - integral(a[::-1], tilt[::-1], 0, 1 - x)
            for x in knots
        ]
    )
    known /= whole
    inside = draws[(draws > knots[0]) & (draws < knots[-1])]
    low, high = known[0], known[-1]
    below, above = (draws <= knots[0]).mean(), (draws >= knots[-1]).mean()
    assert abs(below - low) < 0.03 and abs(above - (1 - high)) < 0.03
    assert kstest(inside, lambda x: (np.interp(x, knots, known) - low) / (high - low)).pvalue > 1e-3


def test_draws_fit_the_density_of_three_experts() -> None:
    """Chi-square over the six orders of the weights, whose probabilities a fine grid gives."""
    a, tilt = double(1.5, 2.0, 3.0), double(6.0, 1.0, 3.0)
    p = TiltedDirichlet(a, tilt)
    torch.manual_seed(1)
    draws = p.sample(torch.Size([20_000]))
    n = 400
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x, y = torch.meshgrid(u, u, indexing="ij")
    grid = torch.stack([x, (1 - x) * y, (1 - x) * (1 - y)], -1)
    # (1 - x): of the map from the square to the triangle
    mass = p.log_prob(grid).exp() * (1 - x) / n**2
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-3)

    def order(routes: Tensor) -> Tensor:
        return routes.argsort(-1) @ torch.tensor([9, 3, 1])

    kinds = order(draws).unique()
    expected = torch.stack([mass[order(grid) == kind].sum() for kind in kinds])
    seen = torch.stack([(order(draws) == kind).sum() for kind in kinds])
    assert len(kinds) == 6
    assert chisquare(seen.numpy(), (expected / expected.sum() * 20_000).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("price", [1.0, 10.0, 100.0])
def test_no_draw_has_a_zero_and_every_log_density_is_finite(price: float) -> None:
    """The product's own sparse prior in float32.

    A third of the weights lies below what float32 can hold.
    """
    torch.manual_seed(0)
    p = TiltedDirichlet(
        torch.tensor([0.0177, 0.3002, 0.1821]), price * torch.tensor([1.0, 0.15, 0.3])
    )
    draws = p.expand(torch.Size([20_000])).sample()
    tiny = torch.finfo(torch.float32).tiny
    # some are clamped, none is zero
    assert draws.dtype == torch.float32 and float(draws.min()) == tiny
    assert bool(p.log_prob(draws).isfinite().all())


def test_values_off_the_simplex_are_refused_and_faces_belong_to_it() -> None:
    p = TiltedDirichlet(double(0.5, 2.0), double(1.0, 0.0), validate_args=True)
    for wrong in (double(0.5, 0.6), double(-0.1, 1.1)):
        with pytest.raises(ValueError, match="support"):
            p.log_prob(wrong)
        with pytest.raises(ValueError, match="support"):
            p.expand(torch.Size([3])).log_prob(wrong)
    base = dist.Dirichlet(p.concentration)
    for face in (double(0.0, 1.0), double(1.0, 0.0)):
        assert float(p.log_prob(face)) == float(base.log_prob(face))  # plus or minus infinity


@pytest.mark.parametrize(
    ("a", "tilt", "message"),
    [
        (double(0.5, 2.0), double(1.0, 0.0, 0.0), r"tilt: expected the 2 experts .*; got \(3,\)"),
        (torch.ones(2, 3), torch.ones(4, 3), r"tilt: expected .* to it, \(2, 3\); got \(4, 3\)"),
        (torch.ones(2, dtype=torch.int64), double(1.0, 0.0), "concentration: expected a floating"),
        (double(0.5, 2.0), double(np.nan, 0.0), "concentration, tilt: expected .*finite numbers"),
        (double(-0.5, 2.0), double(1.0, 0.0), "concentration, tilt: expected positive"),
    ],
)
def test_what_does_not_fit_is_refused(a: Tensor, tilt: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        TiltedDirichlet(a, tilt)


def test_tilts_of_their_own_for_each_member_of_a_batch() -> None:
    a, tilts = (
        double(0.4, 0.8, 1.5).expand(2, 3),
        torch.stack([double(5.0, 0.0, 1.0), double(0.0, 3.0, 0.0)]),
    )
    both = TiltedDirichlet(a, tilts)
    torch.manual_seed(0)
    draws = both.sample(torch.Size([30_000]))
    for row, tilt in enumerate(tilts):
        one = TiltedDirichlet(a[row], tilt)
        torch.testing.assert_close(both.log_normaliser[row], one.log_normaliser)
        torch.testing.assert_close(draws[:, row].mean(0), one.mean, rtol=0, atol=0.01)
        torch.testing.assert_close(both.log_prob(draws)[:, row], one.log_prob(draws[:, row]))


def test_the_kl_is_the_mean_log_ratio_of_draws() -> None:
    q, a, tilt = double(2.0, 1.0, 3.0), double(0.5, 0.2, 0.9), double(8.0, 1.0, 2.0)
    posterior, prior = dist.Dirichlet(q), TiltedDirichlet(a, tilt)
    torch.manual_seed(0)
    draws = posterior.sample(torch.Size([100_000]))
    ratio = posterior.log_prob(draws) - prior.log_prob(draws)
    exact = kl_divergence(posterior, prior)
    assert float(exact) == pytest.approx(
        float(ratio.mean()), abs=4 * float(ratio.std()) / 100_000**0.5
    )
    assert float(tilted_kl(q, a, tilt, tilted_moments(a, tilt).log_normaliser)) == pytest.approx(
        float(exact)
    )
