"""The KL of all layers as one expression over two traces, and whether it may stand for Pyro's."""

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.inference.sites import TARGETS, is_route_site
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.posterior import dirichlet_kl
from bayes_router.routing.tilt import tilted_kl


def stackable(model_trace: Trace, guide_trace: Trace, routes: list[str]) -> bool:
    """Whether nll and KL are what the stacked expression computes.

    Plain Dirichlet routes, one likelihood, no other latent.
    """
    kinds = {type(model_trace.nodes[name]["fn"]) for name in routes}
    plain = kinds in ({pyro.distributions.Dirichlet}, {TiltedDirichlet})
    sites = [
        s
        for trace in (model_trace, guide_trace)
        for s in trace.nodes.values()
        if s["type"] == "sample"
    ]
    known = all(is_route_site(site["name"]) or site["name"] == TARGETS for site in sites)
    mine = [trace.nodes[name] for trace in (model_trace, guide_trace) for name in routes]
    unscaled = all(site["scale"] == 1.0 and site["mask"] is None for site in mine)
    observed = model_trace.nodes.get(TARGETS)
    literal = observed is not None and observed["is_observed"] and observed["scale"] == 1.0
    guided = all(isinstance(guide_trace.nodes[name]["fn"], Dirichlet) for name in routes)
    shapes = {
        trace.nodes[name]["fn"].shape() for trace in (model_trace, guide_trace) for name in routes
    }
    return plain and known and unscaled and literal and guided and len(shapes) == 1


def _shared(value: Tensor, dims: int) -> Tensor:
    """`value` with each leading dimension a one where all that lies along it is one number."""
    lead = value.stride()[: value.dim() - dims]
    return value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in lead)]


def stacked_kl(model_trace: Trace, guide_trace: Trace, routes: list[str]) -> Tensor:
    """Sum over layers and units of KL(q || p), per token: one expression for all."""
    # [L, ..., B, T, E]
    q = torch.stack([guide_trace.nodes[name]["fn"].concentration for name in routes])
    priors = [model_trace.nodes[name]["fn"] for name in routes]
    # [L, 1, 1, E] of one for all tokens
    p = _stacked([_shared(prior.concentration, 1) for prior in priors])
    if isinstance(priors[0], TiltedDirichlet):
        log_z = _stacked([_shared(prior.log_normaliser, 0) for prior in priors])
        # [L, E], or as the concentration
        tilt = _stacked([_shared(prior.tilt, 1) for prior in priors])
        tilt = tilt.view(len(routes), *[1] * (q.dim() - 2), -1) if tilt.dim() == 2 else tilt
        kl = tilted_kl(q, p, tilt, log_z)
    else:
        kl = dirichlet_kl(q, p)  # [L, ..., B, T]
    return kl.mean((-2, -1)).sum()


def _stacked(values: list[Tensor]) -> Tensor:
    """One after the other, [L, ...], of the shape that all fit in."""
    return torch.stack(list(torch.broadcast_tensors(*values)))
