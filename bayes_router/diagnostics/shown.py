"""A text as a run routes it, token by token, ready to be shown."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.diagnostics.reading import pieces, read, text_windows
from bayes_router.routing.posterior import posterior_mean
from bayes_router.routing.watch import watching
from bayes_router.training.risk import read_risk

SHOWN_TOKENS = 4000


class ShownText(NamedTuple):
    """A text as a run routes it, ready to be shown."""

    pieces: list[str]  # what each token shows
    concentration: Tensor  # [L, N, E], of the unit that is shown
    hard_choice: Tensor  # int64 [L, N], of that unit
    nll: Tensor  # [N], of the token itself given those before it in its window; nan for the first
    numbers: Mapping[str, Tensor] = {}  # [N] by the name of a `Scale`, those that the fit can say
    mean: Tensor | None = None  # [L, R, N, E], of every unit
    choice: Tensor | None = None  # int64 [L, R, N], of every unit


def route_text(
    run: FittedRun,
    text: bytes | None = None,
    limit: int = SHOWN_TOKENS,
    source: Any = None,
    unit: int = 0,
) -> ShownText:
    """Read a text, or the first held-out windows of the run, window by window.

    Args:
        run: the run.
        text: UTF-8; None takes held-out text.
        limit: tokens at most.
        source: held-out data, where `text` is None.
        unit: of routing, that is shown.

    Raises:
        ValueError: a unit that the run has not, an empty text, one that is not UTF-8, or text for a
            run whose tokens are none.
    """
    require(limit >= 1, "limit", "at least one token", limit)
    units = run.config.model.num_units
    require(
        0 <= unit < units,
        "unit",
        f"0 to {units - 1}",
        unit,
        f"the fit routes by {run.config.model.route_by}",
    )
    batches = _held_out(run, source, limit) if text is None else _given(run, text, limit)
    ids, q, choices, nll = list[int](), list[Tensor](), list[Tensor](), list[Tensor]()
    numbers: dict[str, list[Tensor]] = {}
    for reading in read(run.model, batches):
        ids += reading.tokens[0].tolist()
        q.append(reading.concentration[:, 0].cpu().movedim(2, 1))
        choices.append(reading.hard_choice[:, 0].cpu().movedim(2, 1))
        nll.append(reading.own_nll(run.causal)[0].cpu())
        for key, values in token_numbers(run.model, reading.tokens).items():
            numbers.setdefault(key, []).append(values)
    concentration, choice = (torch.cat(x, 2)[:, :, :limit] for x in (q, choices))  # [L, R, N, ...]
    return ShownText(
        pieces(ids[:limit], run.tokeniser),
        concentration[:, unit],
        choice[:, unit],
        torch.cat(nll)[:limit],
        {key: torch.cat(values)[:limit] for key, values in numbers.items()},
        posterior_mean(concentration.double()),
        choice,
    )


def _held_out(run: FittedRun, source: Any, limit: int) -> Iterator[Batch]:
    """The first held-out windows, whole ones, one after another."""
    require(source is not None, "source", "held-out data where no text is given", None)
    context = run.config.data.context
    return (
        Batch(tokens[None], targets[None])
        for batch in source.windows(context, 8, -(-limit // context) * context)
        for tokens, targets in zip(*batch, strict=True)
    )


def _given(run: FittedRun, text: bytes, limit: int) -> Iterator[Batch]:
    """The windows of a text of the user's."""
    without = (
        "a patched model without its tokenizer"
        if run.patched
        else "a run on recall, whose tokens are no text"
    )
    require(run.tokeniser is not None, "text", "a fit on text", without)
    assert run.tokeniser is not None
    return text_windows(text, run.tokeniser, run.config.data.context, limit, run.causal)


@torch.no_grad()
def token_numbers(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Risk [T] and how foreign each of tokens [1, T] is, as far as the fit kept what they need.

    One more pass.
    """
    controller, found = model.controller, dict[str, Tensor]()
    if controller.risk is None and controller.evidence is None:
        return found
    seen = nullcontext() if controller.evidence is None else watching(controller)
    with seen as watch:
        if controller.risk is not None:
            found["risk"] = read_risk(model, tokens)[0].cpu()
        else:
            model(tokens)
    if watch is not None:
        usual = torch.stack([layer.log_budget.cpu() for layer in controller.evidence.layers])
        found["foreign"] = (usual[:, None] - watch.log_evidence[:, 0]).mean(0)
    return found
