"""The objective of training: TraceMeanField_ELBO for this model, without work that its value does not need."""

from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.posterior import dirichlet_kl, posterior_mean
from bayes_router.routing.schedule import ScheduleState
from bayes_router.types import LossTerms, route_site

UNCHECKED = dict.fromkeys(
    ("validate_poutine", "validate_infer", "validate_distributions_pyro", "validate_distributions_torch"), False
)
"""Pyro's and torch's checks of values wait for the device, several times a layer; here the program is known to be right."""


class RoutingELBO(TraceMeanField_ELBO):
    """-ELBO = nll + kl_weight * sum_l KL(q_l || p_l), nats per token; the same value and gradient as TraceMeanField_ELBO.

    Pyro's estimator evaluates every site's log density, also those of the routes, which the analytic KL replaces; and it
    computes one KL a site. Here the observed site alone is evaluated, and the KL of all layers is one stacked expression.
    Pyro reads the loss on the host twice a step; here nobody waits for the device, so that a CUDA graph can hold the step.

    `terms` holds the parts of the last loss, detached: the KL in them carries weight 1.
    """

    terms: LossTerms | None = None

    def _get_trace(
        self, model: RoutingModel, guide: RoutingGuide, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[Trace, Trace]:
        guide(*args, **kwargs)
        return guide.get_traces()

    def differentiable_loss(self, model: RoutingModel, guide: RoutingGuide, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The loss, [], with its gradient; the mean over particles."""
        particles = [self._differentiable_loss_particle(*traces)[1] for traces in self._get_traces(model, guide, args, kwargs)]
        return torch.stack(particles).mean() if len(particles) > 1 else particles[0]

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        observed = model_trace.nodes["targets"]
        nll = -_scaled(observed, observed["fn"].log_prob(observed["value"]))
        kl, weighted = _kl(model_trace, guide_trace)
        loss = nll + weighted
        self.terms = LossTerms(nll.detach(), kl.detach(), -(nll + kl).detach())
        return loss.detach(), loss


def _scaled(site: dict[str, Any], density: Tensor) -> Tensor:
    """Sum of a site's log density over unmasked tokens, times the site's scale."""
    mask = site["mask"]
    return (density if mask is None or mask is True else density.masked_fill(~mask, 0.0)).sum() * site["scale"]


def _kl(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """Sum over layers of KL(q || p) per token: as it is, and times kl_weight."""
    layers = [route_site(layer) for layer in range(len(guide_trace.nodes)) if route_site(layer) in guide_trace.nodes]
    q = torch.stack([guide_trace.nodes[name]["fn"].concentration for name in layers])  # [L, B, T, E]
    priors = [model_trace.nodes[name]["fn"] for name in layers]
    p = torch.stack([prior.concentration[0, 0] for prior in priors])[:, None, None]  # [L, 1, 1, E], one for all tokens
    kl = dirichlet_kl(q, p)  # [L, B, T]
    if isinstance(priors[0], TiltedDirichlet):
        log_z = torch.stack([prior.log_normaliser for prior in priors])  # [L, B, T], the same for all tokens
        price = torch.stack([prior.price for prior in priors])[:, None, None]  # [L, 1, 1, E]
        kl = kl + (posterior_mean(q) * price.to(q)).sum(-1) + log_z
    scale = guide_trace.nodes[layers[0]]["scale"]  # kl_weight / (B T), []
    per_token = kl.mean((1, 2)).sum()
    return per_token, per_token * (scale * kl[0].numel()).to(per_token)


class NegativeELBO(nn.Module):
    """`RoutingELBO()(model, guide)` that leaves Pyro's global parameter store alone: for torch optimisers and DDP."""

    def __init__(self, model: RoutingModel, guide: RoutingGuide):
        super().__init__()
        self.model, self.guide, self.elbo = model, guide, RoutingELBO()

    def follow(self, state: ScheduleState) -> None:
        """Move the prior and the weight of its KL to what the schedule says."""
        self.model.set_objective(state.concentration, state.kl_weight, state.price)
        self.model.straight_through = state.straight_through

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms]:
        """The loss to minimise (KL weighted) and its parts (KL not weighted), nats per token."""
        with pyro.settings.context(module_local_params=True, **UNCHECKED):
            loss = self.elbo.differentiable_loss(self.model, self.guide, tokens, targets)
        assert self.elbo.terms is not None
        return loss, self.elbo.terms
