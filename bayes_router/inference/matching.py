"""A model and its guide in one pass: their traces, and whether they are over the same latents."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayes_router.checks import require
from bayes_router.inference.fits import refuse_tracing


def check_guide(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Run both once, as an estimator does, and refuse a guide that is not over the model's latents.

    `RoutingELBO` and `NegativeELBO` check it at each step. Pyro's own estimators do not: a site
    that the guide lacks is drawn from the prior behind a warning (Trace_ELBO, RenyiELBO), in
    silence (Importance, Predictive), or is a KeyError (TraceMeanField_ELBO). So call this before
    them. Draws and parameters stay as they were.

    Args:
        model: any Pyro program.
        guide: its posterior.
        args: what both are called with, (tokens, targets).
        kwargs: by name.

    Raises:
        ValueError: a latent of the model without a site in the guide, a site of the guide that the
            model lacks, or one of another shape; it names both sides.
    """
    devices = {x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        paired_traces(model, guide, args, kwargs)


def paired_traces(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Any,
    kwargs: Any,
    around_model: AbstractContextManager[Any] | None = None,
) -> tuple[Trace, Trace]:
    """The trace of the model, replayed with that of the guide, and the guide's; checked."""
    refuse_tracing()
    for name, part in (("model", model), ("guide", guide)):
        require(callable(part), name, "a program, (tokens, targets)", type(part).__name__)
    effect = poutine.unwrap(guide)
    if isinstance(effect, Messenger):  # a guide that runs inside the model
        guide(*args, **kwargs)
        model_trace, guide_trace = effect.get_traces()
    else:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        with around_model or nullcontext():
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
                *args, **kwargs
            )
    pair = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
    check_sites(*pair)
    return pair


def check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    """Model and guide are over the same latents."""
    latents, drawn = _latents(model_trace), _latents(guide_trace)
    names = ", ".join(latents)
    missing = [name for name in latents if name not in drawn]
    require(
        not missing,
        "guide",
        f"a site for each latent of the model: {names}",
        f"none of {', '.join(missing)}",
    )
    extra = [
        name
        for name, site in drawn.items()
        if name not in latents and not site["infer"].get("is_auxiliary")
    ]
    require(not extra, "guide", f"sites that the model has: {names}", ", ".join(extra))
    observed = guide_trace.observation_nodes
    require(not observed, "guide", "nothing observed", observed, "the order is (model, guide)")
    for name, site in latents.items():
        wanted, got = (tuple(s["fn"].shape()) for s in (site, drawn[name]))
        lacks = wanted[: len(wanted) - len(got)]
        fits = wanted[len(lacks) :] == got and all(size == 1 for size in lacks)
        require(fits, f"guide of {name}", f"the shape of the model's site, {wanted}", got)


def _latents(trace: Trace) -> dict[str, Any]:
    """The sites that are drawn, by name."""
    return {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
