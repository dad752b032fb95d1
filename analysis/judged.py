"""What a run states and promises, judged on text: confidence, risk, the promise of a quality."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.figures import verdicts as verdict_plots
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.diagnostics.measures.bootstrap import clustered
from bayes_router.diagnostics.measures.calibration import rank_correlation, reliability
from bayes_router.diagnostics.measures.confidence import (
    confidence_table,
    right_within,
    split,
    stated_by,
)
from bayes_router.diagnostics.measures.other_text import other_texts
from bayes_router.diagnostics.measures.regret import routing_regret
from bayes_router.routing.policy import at_price
from bayes_router.routing.risk import RiskFit
from bayes_router.routing.saving import save_risk
from bayes_router.training.executed import execute
from bayes_router.training.guarantee import (
    Single,
    cheaper_from,
    keep_promise,
    later_windows,
    strongest_single,
)
from bayes_router.training.risk import fit_risk, reference_of, risk_data
from bayes_router.types import RoutingMode

TOLERANCE = 0.01  # nats by which a right choice may lose to the best
RESPLITS = 400


class Written(NamedTuple):
    """What a part writes, and what it prints."""

    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Callable[[], Axes]]
    shown: str


def confidence(run: FittedRun, options: argparse.Namespace) -> Written:
    """Is this route right, by a probability fitted to regret."""
    rows = list(
        islice(Examination(run).source.windows(run.config.data.context, 1), options.windows)
    )
    frame = routing_regret(run.model, rows, options.pairs)
    fitted, tested = split(frame)
    tables = {
        "confidence": confidence_table(fitted, tested, run.experts, TOLERANCE, options.draws),
        "confidence_regret": frame,
    }
    stated = stated_by(fitted, tested, run.experts, TOLERANCE)
    right = right_within(tested, TOLERANCE)
    curves = [reliability(stated[name], right) for name in ("posterior", "confidence")]
    figures = {
        "confidence_reliability": lambda: verdict_plots.plot_reliability(
            *curves, mended="confidence"
        )
    }
    return Written(tables, figures, text_of(tables["confidence"]))


def risk(run: FittedRun, options: argparse.Namespace) -> Written:
    """What does routing lose, estimated from the routed pass."""
    train, valid = run.config.train, Examination(run).source
    context, limit = (
        run.config.data.context,
        max(options.tokens or run.config.data.eval_tokens, run.config.data.context),
    )
    early = list(valid.windows(context, train.batch_size, limit))
    reference = reference_of(run.model, early[:8])
    head = fit_risk(
        run.model, early, reference, tokens=limit, settings=RiskFit(steps=options.risk_steps)
    )
    save_risk(run.path, head)
    tested = later_windows(valid, context, train.batch_size, limit, limit)
    texts = {"held out": torch.cat([batch.tokens for batch in tested])}
    if run.tokeniser is not None:
        for name, ids in other_texts(texts["held out"].flatten(), run.tokeniser).items():
            texts[name] = ids[: len(ids) // context * context].view(-1, context)[
                : len(texts["held out"])
            ]
    found = []
    for name, rows in texts.items():
        data = risk_data(
            run.model,
            [Batch(part, part) for part in rows.split(train.batch_size)],
            reference,
            rows.numel(),
        )
        estimate, true = (x.double().flatten().numpy() for x in (head(data.features), data.kl))
        entropy, window = (
            data.features[..., -2].double().flatten().numpy(),
            np.repeat(np.arange(len(rows)), context),
        )
        figures = {
            "rank correlation": lambda i, a=estimate, b=true: rank_correlation(a[i], b[i]),
            "rank correlation of the entropy": lambda i, a=entropy, b=true: rank_correlation(
                a[i], b[i]
            ),
            "mean over true mean": lambda i, a=estimate, b=true: float(a[i].mean() / b[i].mean()),
            "true mean (nats)": lambda i, b=true: float(b[i].mean()),
        }
        for figure, of in figures.items():
            found.append(
                {
                    "text": name,
                    "figure": figure,
                    **clustered(of, window, draws=min(options.draws, 100))._asdict(),
                }
            )
    table = pd.DataFrame(found)
    return Written({"risk": table}, {}, text_of(table))


def promised(run: FittedRun, options: argparse.Namespace) -> Written:
    """The promise of a quality, and how often it is kept.

    Windows drawn anew from those that were read.
    """
    train, valid, context = run.config.train, Examination(run).source, run.config.data.context
    limit, cost = max(options.tokens or run.config.data.eval_tokens, context), run.prior.cost_ratio
    best = strongest_single(run.model, list(valid.windows(context, train.batch_size, limit)), cost)
    rows = later_windows(valid, context, train.batch_size, limit, limit)
    family, prices = at_price("argmax", cost.tolist()), cheaper_from(0.0)
    known = {
        price: execute(run.model, rows, cost, RoutingMode.HARD, family(price), price).reading
        for price in prices
    }
    base = execute(run.model, rows, cost, RoutingMode.HARD, Single(best), float("nan")).reading
    excess = {
        price: (r.window_nll - base.window_nll) / base.window_scored for price, r in known.items()
    }
    found = []
    for lost in (0.005, 0.01, 0.02):
        allowed = float(np.log1p(lost))
        kept_to = [r.cost for price, r in known.items() if float(excess[price].mean()) <= allowed]
        hindsight = min(kept_to, default=float("nan"))
        for count in (len(base.window_nll) // 2, len(base.window_nll)):
            kept, spent, refused = [], [], 0
            for seed in range(RESPLITS):
                i = torch.from_numpy(
                    np.random.default_rng(seed).integers(0, len(base.window_nll), count)
                )
                try:
                    price = keep_promise(
                        lambda p, i=i: known[p].of_windows(i),
                        base.of_windows(i),
                        lost,
                        0.95,
                        prices,
                    ).kept.price
                except ValueError:
                    refused += 1
                    continue
                kept.append(float(excess[price].mean()) <= allowed)
                spent.append(known[price].cost / hindsight)
            found.append(
                {
                    "lost": lost,
                    "windows": count,
                    "kept": mean_of(kept),
                    "cost over hindsight": mean_of(spent),
                }
                | {"hindsight": hindsight, "refused": refused, "trials": RESPLITS}
            )
    table = pd.DataFrame(found)
    return Written({"quality": table}, {}, text_of(table))


def mean_of(values: Sequence[float]) -> float:
    """Nan of none: every trial was refused."""
    return float(np.mean(values)) if values else float("nan")


def text_of(table: pd.DataFrame) -> str:
    """A table as text."""
    return table.to_string(float_format=lambda x: f"{x:.3f}", index=table.index.name is not None)
