"""The density of a fit's text, from one pass over some of it after SVI."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.routing.evidence import DIRECTIONS, MEMORY, Evidence, LayerEvidence, Moments
from bayes_router.routing.watch import inputs_of
from bayes_router.types import RoutingMode

FIT_TOKENS = 65_536


@torch.no_grad()
def fit_evidence(
    model: Any,
    batches: Iterable[Batch],
    prior_total: Tensor,
    *,
    tokens: int = FIT_TOKENS,
    directions: int = DIRECTIONS,
    memory: int = MEMORY,
) -> Evidence:
    """Read text like the fit's along the HARD path.

    Its density is kept beside the controller of `model`.

    Args:
        model: a fitted model or a patched one; its mode (train, eval) is as before afterwards.
        batches: windows of the fit's text.
        prior_total: [L], total concentration of the prior.
        tokens: read about so many.
        directions: K of a layer's density.
        memory: tokens of the running mean, see `RunningMean`.

    Raises:
        ValueError: hardly any text.
    """
    require(directions >= 1, "directions", "at least 1", directions)
    require(tokens >= 1, "tokens", "at least 1", tokens)
    controller, was_training, read = model.controller, model.training, 0
    device = next(controller.parameters()).device
    moments: list[Moments] = []
    model.eval()
    try:
        for batch in batches:
            with inputs_of(controller) as inputs:
                out = model(batch.tokens.to(device), RoutingMode.HARD)
            totals = out.concentration.sum(-1)  # [L, B, T], or [L, B, T, R]
            totals = totals if totals.dim() == 3 else totals.mean(-1)
            moments = moments or [Moments(hidden.shape[-1]) for hidden in inputs]
            for one, hidden, total in zip(moments, inputs, totals, strict=True):
                one.add(hidden, total)
            read += batch.tokens.numel()
            if read >= tokens:
                break
    finally:
        model.train(was_training)
    require(len(moments) > 0, "texts", "at least one window of text", "none", "give more text")
    layers = [LayerEvidence.of(one, directions) for one in moments]
    controller.evidence = Evidence(layers, prior_total, memory).to(device)
    found: Evidence = controller.evidence
    return found


def training_batches(
    source: TokenSource, first: int, batch_size: int, context: int, seed: int
) -> Iterable[Batch]:
    """Random windows of a fit's text, from step `first` on: without end."""
    step = first
    while True:
        yield source.batch(step, batch_size, context, seed)
        step += 1
