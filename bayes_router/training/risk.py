"""Fitting the estimate of what routing loses.

Routed and unrouted passes over some text, then a small network on both.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.tokens import Batch
from bayes_router.routing.risk import Risk, RiskFit, RiskHead, risk_features
from bayes_router.transformer.nll import token_kl, token_nll
from bayes_router.types import RoutingMode, RoutingOutput

FIT_TOKENS = 32_768


class RiskData(NamedTuple):
    """What two passes leave of a text."""

    features: Tensor  # [B, T, F]
    kl: Tensor  # [B, T], nats


@contextmanager
def _head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """The last hidden states [B, T, D] of the passes made inside."""
    found: list[Tensor] = []
    handle = model.show_last(found.append)
    try:
        yield found
    finally:
        handle.remove()


def _routed(model: Any, tokens: Tensor) -> tuple[RoutingOutput, Tensor]:
    with _head_inputs(model) as hidden:
        out = model(tokens, RoutingMode.HARD)
    return out, risk_features(hidden[-1], out.concentration, out.logits)


def model_device(model: Any) -> torch.device:
    """Where a model's controllers are, and its tokens go."""
    return torch.device(next(model.controller.parameters()).device)


@torch.no_grad()
def reference_of(model: Any, batches: Iterable[Batch]) -> Callable[[Tensor], Tensor]:
    """Tokens -> logits of what routing is compared with.

    The model before its patch, else the best single expert on a text.
    """
    if hasattr(model, "unrouted"):
        unrouted: Callable[[Tensor], Tensor] = model.unrouted
        return unrouted
    totals = dict.fromkeys(model.config.experts, 0.0)
    device = next(model.parameters()).device
    for batch in batches:
        targets = batch.targets.to(device)
        for name in totals:
            logits = model(batch.tokens.to(device), force=name).logits
            totals[name] += float(token_nll(logits, targets).sum())
    best = min(totals, key=lambda name: totals[name])

    def static(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens, force=best).logits
        return logits

    return static


@torch.no_grad()
def risk_data(
    model: Any, batches: Iterable[Batch], reference: Callable[[Tensor], Tensor], tokens: int
) -> RiskData:
    """Features and divergences of about so many tokens.

    The mode (train, eval) of the model is as before afterwards.

    Raises:
        ValueError: no text.
    """
    require(tokens >= 1, "tokens", "at least 1", tokens)
    was_training, device, read = model.training, model_device(model), 0
    features, kl = [], []
    model.eval()
    try:
        for batch in batches:
            ids = batch.tokens.to(device)
            out, known = _routed(model, ids)
            features.append(known.cpu())
            kl.append(token_kl(reference(ids), out.logits).cpu())
            read += ids.numel()
            if read >= tokens:
                break
    finally:
        model.train(was_training)
    require(len(kl) > 0, "texts", "at least one window of text", "none", "give more text")
    return RiskData(torch.cat(features), torch.cat(kl))


def fit_risk(
    model: Any,
    batches: Iterable[Batch],
    reference: Callable[[Tensor], Tensor],
    *,
    tokens: int = FIT_TOKENS,
    settings: RiskFit | None = None,
) -> Risk:
    """Keep an estimate of KL(reference || routed) beside the controller of `model`.

    It holds under the policy of now.

    Args:
        model: a fitted model or a patched one.
        batches: windows of text like that which it will read.
        reference: see `reference_of`.
        tokens: read about so many, twice.
        settings: of the network's training.

    Raises:
        ValueError: hardly any text, or routing changes nothing.
    """
    found, device = risk_data(model, batches, reference, tokens), model_device(model)
    with torch.enable_grad():
        both = found.features.flatten(0, 1).to(device), found.kl.flatten().to(device)
        risk = Risk(RiskHead.fit(*both, settings))
    model.controller.risk = risk
    return risk


@torch.no_grad()
def read_risk(model: Any, tokens: Tensor) -> Tensor:
    """The estimated KL(reference || routed) at each token of a routed pass, nats, [B, T]; one pass.

    Raises:
        ValueError: no estimate was fitted.
    """
    risk: Risk | None = getattr(model.controller, "risk", None)
    if risk is None:
        raise ValueError(
            "risk: expected a fitted estimate of what routing loses; got none; fit one: "
            "fit_risk(texts)"
        )
    return risk(_routed(model, tokens)[1])
