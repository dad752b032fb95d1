"""The tilted Dirichlet as a Pyro distribution: what the compute-aware prior is once its weights have a price."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Dirichlet, constraints, kl_divergence, register_kl

from bayes_router.routing.posterior import posterior_mean
from bayes_router.routing.tilt import sample_tilted, tilted_moments


class TiltedDirichlet(dist.TorchDistribution):
    """p(route) = Dirichlet(route; concentration) exp(-price . route) / Z.

    Args:
        concentration: [..., E].
        price: [E], nats per unit of weight on each expert (price per cost x cost ratio).
        log_normaliser: log Z [...], if it is known already.

    KL(Dirichlet(q) || this) = KL(Dirichlet(q) || Dirichlet(concentration)) + price . E_q[route] + log Z, exact.
    """

    arg_constraints = {"concentration": constraints.independent(constraints.positive, 1)}
    support = constraints.simplex

    def __init__(self, concentration: Tensor, price: Tensor, log_normaliser: Tensor | None = None):
        self.concentration, self.price = concentration, price
        self.base = dist.Dirichlet(concentration, validate_args=False)
        if log_normaliser is None:
            log_normaliser = tilted_moments(concentration, price).log_normaliser.to(concentration.dtype)
        self.log_normaliser = log_normaliser
        super().__init__(concentration.shape[:-1], concentration.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "TiltedDirichlet":
        """The same for every token."""
        shape = (*batch_shape, self.concentration.shape[-1])
        return TiltedDirichlet(self.concentration.expand(shape), self.price, self.log_normaliser.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log density, [...]."""
        return self.base.log_prob(value) - value @ self.price.to(value) - self.log_normaliser

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Exact draws, by rejection."""
        draws = sample_tilted(self.concentration, self.price, max(1, sample_shape.numel()))
        return draws.reshape(*sample_shape, *self.batch_shape, *self.event_shape).to(self.concentration.dtype)


@register_kl(Dirichlet, TiltedDirichlet)
def _kl_dirichlet_tilted(q: Dirichlet, p: TiltedDirichlet) -> Tensor:
    return kl_divergence(q, p.base) + posterior_mean(q.concentration) @ p.price + p.log_normaliser
