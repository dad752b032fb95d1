"""Programs of one layer and two experts whose every number is a one-dimensional integral."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from scipy.integrate import quad
from torch import Tensor, nn

from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.types import Route
from tests.diagnostics.toy import THETA, BlindNetwork, MixtureNetwork, toy

PRIOR, Q = (1.0, 1.5), (4.0, 1.2)
TOKENS, TARGETS = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, 2], [2, 1, 0]])


def mixture() -> tuple[RoutingModel, RoutingGuide]:
    """p(y | route) = route @ THETA[:, y], the guide a fixed Dirichlet(Q)."""
    return toy(MixtureNetwork(), torch.tensor([PRIOR]), torch.tensor([Q]))


def blind(guide: tuple[float, float] = PRIOR) -> tuple[RoutingModel, RoutingGuide]:
    """The targets say nothing of the route: the posterior is the prior."""
    return toy(BlindNetwork(), torch.tensor([PRIOR]), torch.tensor([guide]))


def mean_under(a: tuple[float, float], f: object) -> float:
    """E[f(x)], (x, 1 - x) ~ Dirichlet(a)."""
    weight = (a[0] - 1, a[1] - 1)
    whole = quad(lambda x: 1.0, 0, 1, weight="alg", wvar=weight)[0]
    return float(quad(f, 0, 1, weight="alg", wvar=weight)[0] / whole)


def likelihood(x: float, target: int) -> float:
    return float(x * THETA[0, target] + (1 - x) * THETA[1, target])


def exact_evidence(power: float = 1.0) -> float:
    """log of the mean of p(y | route)^power under the prior, summed over TARGETS."""
    one = {y: np.log(mean_under(PRIOR, lambda x, y=y: likelihood(x, y) ** power)) for y in range(3)}
    return float(sum(one[int(y)] for y in TARGETS.flatten()))


def exact_elbo() -> float:
    """Of the fixed guide, summed over TARGETS."""
    fit = sum(
        mean_under(Q, lambda x, y=int(y): np.log(likelihood(x, y))) for y in TARGETS.flatten()
    )
    kl = torch.distributions.kl_divergence(
        dist.Dirichlet(torch.tensor(Q)), dist.Dirichlet(torch.tensor(PRIOR))
    )
    return float(fit) - TARGETS.numel() * float(kl)


X = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.5, -0.7]], dtype=torch.float64)
Y = torch.tensor([[0.8, -1.1, 0.2], [0.5, 1.9, 0.1]], dtype=torch.float64)


class LinearNetwork(PyroModule):
    """y ~ Normal(slope * x, 1), slope ~ Normal(0, 1), blind to the route.

    A known Gaussian posterior over a weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slope = PyroSample(dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))

    def forward(self, tokens: Tensor, route: Route) -> Tensor:
        route(0, torch.zeros(*tokens.shape, 1))
        return self.slope * X


def slope_posterior() -> tuple[float, float]:
    """Mean and standard deviation of the weight given X and Y."""
    precision = 1 + float(X.square().sum())
    return float((X * Y).sum()) / precision, precision**-0.5


def slope_evidence() -> float:
    """log p(Y | X), the weight integrated out: a Gaussian with covariance 1 + x x^T."""
    x, y = X.flatten(), Y.flatten()
    covariance = torch.eye(len(x), dtype=torch.float64) + torch.outer(x, x)
    return float(dist.MultivariateNormal(torch.zeros_like(x), covariance).log_prob(y))


class UnitNetwork(nn.Module):
    """Three routing units; says the mixture of the mean route."""

    num_units, num_experts = 3, 2

    def forward(self, tokens: Tensor, route: Route) -> Tensor:
        weights = route(0, torch.zeros(*tokens.shape, 1))
        assert isinstance(weights, Tensor) and weights.shape == (*tokens.shape, 3, 2)
        return (weights.mean(-2) @ THETA.to(weights)).log()


class UnitController:
    """A posterior of its own for each unit."""

    concentration = torch.tensor([[4.0, 1.2], [1.0, 1.0], [0.5, 3.0]])

    def posterior(self, layer: int, hidden: Tensor) -> dist.Dirichlet:
        return dist.Dirichlet(self.concentration.expand(*hidden.shape[:-1], 3, 2))


def hand_written(tokens: Tensor, targets: Tensor | None = None) -> None:
    """The guide that a user of Pyro writes: Dirichlet(Q) for all."""
    with pyro.plate("batch", tokens.shape[0], dim=-2), pyro.plate("token", tokens.shape[1], dim=-1):
        pyro.sample("route_0", dist.Dirichlet(torch.tensor(Q).expand(*tokens.shape, 2)))
