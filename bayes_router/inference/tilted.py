"""The tilted Dirichlet as a Pyro distribution.

What the compute-aware prior is once its weights have a price.
"""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Dirichlet, constraints, register_kl

from bayes_router.checks import broadcasts, require
from bayes_router.routing.tilt import TiltedMoments, sample_tilted, tilted_kl, tilted_moments


class TiltedDirichlet(dist.TorchDistribution):
    """p(route) = Dirichlet(route; concentration) exp(-tilt . route) / Z.

    Args:
        concentration: [..., E], positive.
        tilt: nats per unit of weight on each expert (price times cost ratio), [E] or one that
            broadcasts to [..., E].
        log_normaliser: log Z [...], if it is known already.
        validate_args: whether values are checked to lie on the simplex, its faces included.

    Raises:
        ValueError: the tilt is not over as many experts as the concentration, or log Z, where it
            is computed here, is no number.

    KL(Dirichlet(q) || this) = KL(Dirichlet(q) || Dirichlet(concentration)) + tilt . E_q[route] +
    log Z, exact.
    """

    arg_constraints = {"concentration": constraints.independent(constraints.positive, 1)}
    support = constraints.simplex

    def __init__(
        self,
        concentration: Tensor,
        tilt: Tensor,
        log_normaliser: Tensor | None = None,
        validate_args: bool = False,
    ):
        E = concentration.shape[-1:]
        real = concentration.is_floating_point()
        require(real, "concentration", "a floating point tensor", concentration.dtype)
        fits = tilt.shape[-1:] == E and broadcasts(tilt.shape, concentration.shape)
        whole = f"the {E[0]} experts of the concentration, or what broadcasts to it, "
        require(fits, "tilt", f"{whole}{tuple(concentration.shape)}", tuple(tilt.shape))
        self.concentration, self.tilt = concentration, tilt
        self.base = dist.Dirichlet(concentration, validate_args=False)
        if log_normaliser is None:
            log_normaliser = tilted_moments(concentration, tilt).log_normaliser.to(
                concentration.dtype
            )
            known = bool((concentration > 0).all() & log_normaliser.isfinite().all())
            given, wanted = (concentration.tolist(), tilt.tolist()), "positive and finite numbers"
            require(known, "concentration, tilt", wanted, given)
        self.log_normaliser = log_normaliser
        super().__init__(concentration.shape[:-1], E, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "TiltedDirichlet":
        """The same for every token."""
        shape = (*batch_shape, self.concentration.shape[-1])
        tilt = self.tilt if self.tilt.dim() == 1 else self.tilt.expand(shape)
        log_normaliser = self.log_normaliser.expand(batch_shape)
        return TiltedDirichlet(
            self.concentration.expand(shape), tilt, log_normaliser, self._validate_args
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log density, [...].

        Infinite, as a Dirichlet's, on a face where its concentration is not 1.
        """
        if self._validate_args:
            self._validate_sample(value)
        return (
            self.base.log_prob(value) - (value * self.tilt.to(value)).sum(-1) - self.log_normaliser
        )

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Exact draws, by rejection.

        Weights below the least normal number are that number, as torch's Dirichlet has it.
        """
        draws = sample_tilted(self.concentration, self.tilt, max(1, sample_shape.numel()))
        draws = draws.to(self.concentration.dtype).clamp_min(
            torch.finfo(self.concentration.dtype).tiny
        )
        return draws.reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def _moments(self) -> TiltedMoments:
        return tilted_moments(self.concentration, self.tilt)

    @property
    def mean(self) -> Tensor:
        """E[route], [..., E]."""
        return self._moments().mean.to(self.concentration.dtype)

    @property
    def variance(self) -> Tensor:
        """Var[route], [..., E]."""
        return self._moments().variance.to(self.concentration.dtype)


@register_kl(Dirichlet, TiltedDirichlet)
def _kl_dirichlet_tilted(q: Dirichlet, p: TiltedDirichlet) -> Tensor:
    return tilted_kl(q.concentration, p.concentration, p.tilt, p.log_normaliser)
