"""What the parts of a program have to fit: each misfit is one ValueError that names both sides."""

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution

from bayes_router.checks import broadcasts, require
from bayes_router.inference.likelihood import NextToken
from bayes_router.inference.prior import DirichletPrior
from bayes_router.inference.sites import Plates
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.padding import check_tokens
from bayes_router.types import IGNORED


def check_network(network: Any) -> None:
    """It is called by (tokens, route); a bundle of network and controller is not."""
    require(
        callable(network) and not isinstance(network, RoutedLanguageModel),
        "network",
        "(tokens, route) -> output",
        type(network).__name__,
        "of a RoutedLanguageModel pass lm.network, and lm.controller to RoutingGuide",
    )


def check_prior(prior: Any, network: Any) -> None:
    """A callable; a `DirichletPrior` has the layers and experts of the network."""
    require(
        callable(prior) and not isinstance(prior, Distribution),
        "prior",
        "a tensor of concentrations [L, E], or (layer, shape) -> distribution",
        type(prior).__name__,
        "of a ComputeAwarePrior pass .concentration; a distribution: lambda layer, shape: it",
    )
    if isinstance(prior, DirichletPrior):
        for axis, what in ((-1, "experts"), (0, "layers")):
            known = getattr(network, f"num_{what}", None)
            got = prior.concentration.shape[axis]
            require(known in (None, got), "prior", f"the {known} {what} of the network", got)


def check_distribution(what: str, fn: Any) -> None:
    """Torch's or Pyro's."""
    require(isinstance(fn, Distribution), what, "a distribution", type(fn).__name__)


def check_pyros(what: str, fn: Any) -> None:
    """Sites take Pyro's own classes."""
    kind = f"{type(fn).__module__}.{type(fn).__name__}"
    fix = "torch's own have their likes in pyro.distributions"
    require(isinstance(fn, TorchDistributionMixin), what, "a distribution of Pyro", kind, fix)


def check_experts(what: str, fn: Any, network: Any) -> int:
    """E of a distribution over routes: that of the network."""
    experts = getattr(network, "num_experts", None)
    shape = tuple(fn.event_shape)
    wanted = "event shape [E]" if experts is None else f"the {experts} experts of the network"
    require(len(shape) == 1 and experts in (None, shape[0]), what, wanted, shape)
    return shape[0]


def broadcast_prior(what: str, fn: Any, shape: torch.Size) -> Any:
    """The prior of a layer for every route, batch shape [(R,) B, T]."""
    if fn.batch_shape == shape:
        return fn
    require(
        broadcasts(fn.batch_shape, shape),
        what,
        f"batch shape {tuple(shape)}, or what broadcasts to it",
        tuple(fn.batch_shape),
    )
    return fn.expand(shape)


def check_likelihood(said: Any, plates: Plates) -> bool:
    """Whether there is one target a token, not one a row."""
    check_pyros("likelihood", said)
    B, T = plates.B, plates.T
    shape = tuple(said.batch_shape)[-2:]
    require(
        shape in ((B, T), (B, 1)),
        "likelihood",
        f"batch shape [B, T] = {(B, T)} or [B, 1] = {(B, 1)}",
        tuple(said.batch_shape),
        "one target a token, or one a row: give it a last dimension of 1",
    )
    return shape == (B, T)


def scored(said: Any, targets: Tensor) -> tuple[Tensor, Tensor | bool]:
    """The targets as the likelihood is given them, and which of them count.

    Integer targets of -100 do not; a 0 stands in their place.
    """
    require(
        isinstance(targets, Tensor),
        "targets",
        "a tensor, or None: not observed",
        type(targets).__name__,
    )
    whole = (*tuple(said.batch_shape)[-2:], *said.event_shape)
    require(
        targets.shape == whole,
        "targets",
        f"the shape of the likelihood, {whole}",
        tuple(targets.shape),
        "targets and likelihood are over the same tokens",
    )
    counts: Tensor | bool = True
    if not targets.is_floating_point() and said.event_dim == 0:
        counts = targets != IGNORED
        targets = torch.where(counts, targets, 0)
    if isinstance(said, NextToken):
        check_tokens(targets, said.logits.shape[-1], name="targets")
    return targets, counts


def refuse_tracing() -> None:
    """ValueError under `torch.jit`'s tracer (Pyro's Jit estimators).

    It would freeze shapes and the price of one pass.
    """
    require(
        not torch._C._get_tracing_state(),
        "estimator",
        "one that does not trace by torch.jit",
        "a Jit estimator",
        "take the estimator without Jit; on a GPU train.graph replays a whole step",
    )
