"""The objective of training.

The ELBO of this model per token, its KL weighted, without work that its value does not need.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from bayes_router.checks import positive, require
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.matching import paired_traces
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.sites import TARGETS, is_route_site
from bayes_router.inference.stacked import stackable, stacked_kl
from bayes_router.inference.weighted import Literal
from bayes_router.routing.schedule import ScheduleState
from bayes_router.types import LossTerms

UNCHECKED = dict.fromkeys(
    (
        "validate_poutine",
        "validate_infer",
        "validate_distributions_pyro",
        "validate_distributions_torch",
    ),
    False,
)
"""Pyro's and torch's checks of values wait for the device, several times a layer.

Here the program is known to be right.
"""


TINY = "a tiny one stands for zero"


class Tempered(nn.Module):
    """p(z) p(targets | z)^(1 / kl_weight).

    What a KL weight pursues, for Pyro's own estimators and samplers; see `tempered`.
    """

    def __init__(self, model: Callable[..., Any], kl_weight: float):
        super().__init__()
        self.model, self.kl_weight = model, positive("kl_weight", kl_weight, TINY)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, the density of what it observes raised to the power 1 / kl_weight."""
        with _Tempered(1 / self.kl_weight):
            return self.model(*args, **kwargs)


def tempered(model: Callable[..., Any], kl_weight: float) -> Tempered:
    """The cold posterior that a KL weight pursues, as a program.

    p(routes) p(targets | routes)^(1 / kl_weight).

    Maximising E_q[log p(y | z)] - w KL(q || p) and maximising the ELBO of this program are the
    same, whatever the guide, and the program has a density, so that samplers and importance weights
    mean something too. Its loss, times w and divided by the number of tokens, is that of
    `RoutingELBO(kl_weight=w)`.

    Args:
        model: any Pyro program; what it observes is the likelihood.
        kl_weight: w, positive; 1 leaves the model as it is.

    Raises:
        ValueError: a weight that is not positive.
    """
    return Tempered(model, kl_weight)


class _Tempered(Messenger):
    """Scales what is observed."""

    def __init__(self, power: float):
        super().__init__()
        self.power = power

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.power


class RoutingELBO(TraceMeanField_ELBO):
    """The ELBO with a weighted KL: (nll + kl_weight * KL(q || p)) / (B T), nats per token.

    See `LossTerms`.

    Without a weight it is TraceMeanField_ELBO in value and gradient, nats of the batch, whatever
    the model and the guide; with kl_weight 1 it is that divided by B T. For Dirichlet routes under
    a (tilted) Dirichlet prior, and no other latent, it is computed without what Pyro's estimator
    does
    besides: log densities of the routes, which the analytic KL replaces, one KL a site, and waiting
    for the device twice a step (a CUDA graph can hold the step). Anything else is left to Pyro's
    estimator, the KL of every latent weighted alike.

    `terms` holds the parts of the last loss, detached means over particles, nats per token: the KL
    in them carries weight 1.

    Args:
        kl_weight: of the KL, the loss then in nats per token; None: the literal ELBO, nats of the
            batch.
        settings: of Pyro's estimator: num_particles, vectorize_particles, ...

    Raises:
        ValueError: a weight that is not positive.
    """

    def __init__(self, kl_weight: float | None = None, **settings: Any):
        super().__init__(**settings)
        require(self.num_particles >= 1, "num_particles", "at least 1", self.num_particles)
        self.terms: LossTerms | None = None
        self.set_kl_weight(1.0 if kl_weight is None else kl_weight)
        self.per_token = kl_weight is not None

    @property
    def kl_weight(self) -> float:
        """The weight of the KL; `set_kl_weight` moves it."""
        return self._kl_weight

    def set_kl_weight(self, kl_weight: float, on_device: Tensor | None = None) -> None:
        """Weigh the KL anew, by the same number on the device where a CUDA graph reads it."""
        self._kl_weight, self.per_token = positive("kl_weight", kl_weight, TINY), True
        self._weight: float | Tensor = self._kl_weight if on_device is None else on_device

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss, without its gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, [], with its gradient; the mean over particles."""
        with self._collecting() as terms:
            losses = [
                self._particle(p, q, terms) for p, q in self._get_traces(model, guide, args, kwargs)
            ]
        return (
            losses[0] if self.num_particles == 1 else torch.stack(losses).sum() / self.num_particles
        )

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss; its gradient is added to the parameters, particle by particle."""
        total = 0.0
        with self._collecting() as terms:
            for p, q in self._get_traces(model, guide, args, kwargs):
                loss = self._particle(p, q, terms) / self.num_particles
                if loss.requires_grad:
                    loss.backward(retain_graph=self.retain_graph)
                total += float(loss.detach())
        return total

    @contextmanager
    def _collecting(self) -> Iterator[list[LossTerms]]:
        """The terms of each particle; their mean is kept in the end."""
        terms: list[LossTerms] = []
        yield terms
        nll, kl = (
            sum(parts[1:], parts[0]) for parts in zip(*((t.nll, t.kl) for t in terms), strict=True)
        )
        if self.num_particles > 1:
            nll, kl = nll / self.num_particles, kl / self.num_particles
        self.terms = LossTerms(nll, kl, -(nll + kl))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """As Pyro's, without a log density that may not be needed."""
        return paired_traces(model, guide, args, kwargs, Literal(self.kl_weight))

    def _particle(self, model_trace: Trace, guide_trace: Trace, terms: list[LossTerms]) -> Tensor:
        """The loss of a pair of traces, particles in a plate summed."""
        routes = [name for name in guide_trace.nodes if is_route_site(name)]
        require(
            len(routes) > 0,
            "model",
            "at least one route site",
            "none",
            "the number of tokens is read there",
        )
        tokens = torch.Size(model_trace.nodes[routes[0]]["fn"].batch_shape[-2:]).numel()
        if stackable(model_trace, guide_trace, routes):
            observed = model_trace.nodes[TARGETS]
            nll = -_unmasked(observed, observed["fn"].log_prob(observed["value"])).sum() * (
                1 / tokens
            )
            kl = stacked_kl(model_trace, guide_trace, routes)
        else:
            nll, kl = self._by_pyro(model_trace, guide_trace, 1 / tokens)
        weight = self._weight
        weighted = kl * (weight.to(kl) if isinstance(weight, Tensor) else weight)
        terms.append(LossTerms(nll.detach(), kl.detach(), -(nll + kl).detach()))
        loss = nll + weighted
        return loss if self.per_token else loss * tokens

    def _by_pyro(
        self, model_trace: Trace, guide_trace: Trace, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Nll and KL by Pyro's estimator."""
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
        nll = torch.zeros(())
        for site in model_trace.nodes.values():
            if site["type"] == "sample" and site["is_observed"]:
                nll = nll - site["log_prob_sum"]
        _, loss = TraceMeanField_ELBO._differentiable_loss_particle(self, model_trace, guide_trace)
        return nll * scale, (loss - nll) * scale


def _unmasked(site: dict[str, Any], density: Tensor) -> Tensor:
    """A site's log density where it counts, 0 elsewhere."""
    mask = site["mask"]
    return (
        density
        if mask is None or mask is True
        else density.masked_fill(~torch.as_tensor(mask), 0.0)
    )


class NegativeELBO(nn.Module):
    """`RoutingELBO(kl_weight)(model, guide)` that leaves Pyro's global parameter store alone.

    For torch optimisers and DDP.

    Args:
        model: the program.
        guide: its posterior.
        kl_weight: of the KL at the start; `follow` moves it.
    """

    kl_scale: Tensor  # [], kl_weight, where a captured CUDA graph reads it

    def __init__(self, model: RoutingModel, guide: RoutingGuide, kl_weight: float = 1.0):
        super().__init__()
        positive("kl_weight", kl_weight, TINY)
        self.model, self.guide, self.elbo = model, guide, RoutingELBO(kl_weight)
        device = next((b.device for b in model.buffers()), torch.device("cpu"))
        scale = torch.full((), float(kl_weight), dtype=torch.float64, device=device)
        self.register_buffer("kl_scale", scale, persistent=False)

    @property
    def kl_weight(self) -> float:
        """The weight of the KL; `follow` moves it."""
        return self.elbo.kl_weight

    def follow(self, state: ScheduleState) -> None:
        """Move the prior and the weight of its KL to what the schedule says."""
        self.model.set_prior(state.concentration, state.price)
        self.elbo.set_kl_weight(state.kl_weight)
        self.kl_scale.fill_(state.kl_weight)
        self.model.straight_through = state.straight_through

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms]:
        """The loss to minimise (KL weighted) and its parts (KL not weighted), nats per token."""
        self.elbo.set_kl_weight(self.elbo.kl_weight, self.kl_scale)
        with pyro.settings.context(module_local_params=True, **UNCHECKED):
            loss = self.elbo.differentiable_loss(self.model, self.guide, tokens, targets)
        assert self.elbo.terms is not None
        return loss, self.elbo.terms
