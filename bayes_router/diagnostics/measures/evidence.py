"""Does evidence tell text like the fit's from other text, token by token?

AUROC with an interval over windows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.diagnostics.measures.bootstrap import Estimate, clustered
from bayes_router.diagnostics.measures.calibration import auroc
from bayes_router.routing.watch import RunningMean, evidence_of, watching
from bayes_router.transformer.nll import token_nll
from bayes_router.types import RoutingMode

DRAWS = 100
PASSAGE = 64
Scores = dict[str, npt.NDArray[np.float64]]


@torch.no_grad()
def token_scores(model: Any, tokens: Tensor, context: int) -> Scores:
    """How foreign each token of a text is, by name of the score.

    Each [windows, T], more is more foreign.

    `token`: less log evidence of the token alone, mean over layers. `recent`: its running mean over
    the last tokens, as the fit keeps it. `passage`: its mean over stretches of 64 tokens.
    `posterior`: less the total concentration that the fit gave its posteriors. `nll`: of the next
    token, nats, which evidence does not see.
    """
    evidence, device = evidence_of(model.controller), next(model.parameters()).device
    windows = (len(tokens) - 1) // context
    require(
        windows >= 1, "text", f"at least {context + 1} tokens", len(tokens), "give a longer text"
    )
    index = torch.arange(windows)[:, None] * context + torch.arange(context + 1)
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("token", "recent", "passage", "posterior", "nll")
    }
    for rows in tokens[index].long().split(8):
        with watching(model.controller, memory=1) as watch:
            out = model(rows[:, :-1].to(device), RoutingMode.HARD)
        log = watch.log_evidence.mean(0)  # [B, T]
        stretch = max(1, min(PASSAGE, context))
        passages = log[:, : context // stretch * stretch].unflatten(1, (-1, stretch)).mean(-1)
        nll = token_nll(out.logits, rows[:, 1:].to(device))
        totals = out.concentration.sum(-1)  # [L, B, T], or [L, B, T, R]
        totals = totals if totals.dim() == 3 else totals.mean(-1)
        values = (-log, -RunningMean(evidence.memory)(log), -passages, -totals.mean(0), nll)
        for name, value in zip(found, values, strict=True):
            found[name].append(value.cpu())
    return {name: torch.cat(parts).double().numpy() for name, parts in found.items()}


def evidence_apart(
    model: Any, own: Tensor, others: Mapping[str, Tensor], context: int, draws: int = DRAWS
) -> pd.DataFrame:
    """AUROC with which each score of `token_scores` tells other texts from the own one.

    0.5 is chance; below it the other text looks more like the fit's than held-out text of the fit
    does.

    Args:
        model: a fitted model or a patched one, with evidence.
        own: token ids [N] of held-out text of the fit's kind.
        others: token ids of other texts by name.
        context: tokens of a window.
        draws: of the bootstrap.

    Returns:
        One row a text and score: text, score, auroc, low, high, n (tokens or passages of the other
            text).

    Raises:
        ValueError: the fit kept no evidence, or a text is shorter than a window.
    """
    base, rows = token_scores(model, own, context), []
    for text, tokens in others.items():
        for name, score in token_scores(model, tokens, context).items():
            estimate = auroc_of(score, base[name], draws)
            rows.append(
                {
                    "text": text,
                    "score": name,
                    "auroc": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                }
            )
            rows[-1]["n"] = score.size
    return pd.DataFrame(rows)


def auroc_of(
    other: npt.NDArray[np.float64], own: npt.NDArray[np.float64], draws: int = DRAWS
) -> Estimate:
    """P(a token of `other` [windows, T] scores above one of `own`).

    With its interval over windows.
    """
    score = np.concatenate([other.ravel(), own.ravel()])
    foreign = np.repeat([True, False], [other.size, own.size])
    windows = np.concatenate([np.repeat(np.arange(len(x)), x.shape[1]) for x in (other, own)])

    def statistic(rows: npt.NDArray[np.int64]) -> float:
        inside = foreign[rows]
        return auroc(score[rows][inside], score[rows][~inside])

    return clustered(statistic, windows + foreign * len(own), kind=foreign, draws=draws)
