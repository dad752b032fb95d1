"""The library's own diagnostics that read the text more than once, for a report."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from bayes_router.checks import require
from bayes_router.diagnostics.diagnostic import Diagnostic, Plot, register_diagnostic
from bayes_router.diagnostics.figures import verdicts as verdict_plots
from bayes_router.diagnostics.figures.rivals import plot_rivals
from bayes_router.diagnostics.measures.amortisation import (
    AmortisationGap,
    amortisation_gap,
    gap_verdict,
)
from bayes_router.diagnostics.measures.calibration import (
    Calibration,
    calibrate,
    calibration_verdicts,
    rank_correlation,
    stability,
)
from bayes_router.diagnostics.measures.k_hat import k_hat_frame, k_hat_verdicts
from bayes_router.diagnostics.measures.other_text import (
    other_text_verdict,
    other_texts,
    tell_apart,
)
from bayes_router.diagnostics.measures.rivals import against_static, sentence
from bayes_router.diagnostics.measures.verdict import Severity, Verdict

OWN_ROWS = 32  # windows of the training text that other text is told apart from


def _k_hat(examined: Any) -> pd.DataFrame:
    run, effort, context = examined.run, examined.effort, examined.run.config.data.context
    rows = examined.rows(effort.guide_sequences)
    lengths = [length for length in effort.guide_lengths if length <= context]
    lengths = lengths if run.causal else [context]
    require(
        len(lengths) > 0,
        "guide_lengths",
        f"one of at most {context} tokens",
        effort.guide_lengths,
    )
    sequences = [(batch.tokens[0], batch.targets[0]) for batch in rows]
    draws, weight = effort.guide_draws, run.kl_weight
    return k_hat_frame(run.program, run.guide, sequences, lengths, draws, kl_weight=weight)


def _k_hat_numbers(examined: Any, frame: pd.DataFrame) -> dict[str, float]:
    median = frame.groupby(["target", "length"], as_index=False)["k_hat"].median()
    values = {
        f"k-hat, {row.target}, {row.length} tokens (median)": row.k_hat
        for row in median.itertuples()
    }
    joint = frame[frame["target"] == "joint"].dropna(axis=1)
    last = joint.groupby("length").mean(numeric_only=True).iloc[-1]
    bounds = [name for name in last.index if name.startswith("bound_")]
    return values | {f"{name} (nats per token)": last[name] for name in bounds}


def _k_hat_plots(examined: Any, frame: pd.DataFrame) -> Sequence[Plot]:
    caption = "Below the line its draws can be reweighted to the posterior."
    limit = examined.thresholds.fit.k_hat
    return [
        Plot(
            "Guide against the exact joint", caption, lambda: verdict_plots.plot_k_hat(frame, limit)
        )
    ]


class Gaps(NamedTuple):
    """The amortisation gap under the objective of training, and under the ELBO."""

    trained: AmortisationGap
    elbo: AmortisationGap | None  # None: of a patch, whose price is one at its fit's KL weight


def _gaps(examined: Any) -> Gaps:
    run, effort = examined.run, examined.effort
    columns = zip(*examined.rows(effort.gap_sequences), strict=True)
    tokens, targets = (torch.cat(column)[:, : effort.gap_length] for column in columns)

    def gap(weight: float) -> AmortisationGap:
        return amortisation_gap(
            run.program, run.guide, tokens, targets, kl_weight=weight, steps=effort.gap_steps
        )

    if run.patched and run.program.price > 0:
        weight = f"{run.kl_weight:.3g}"
        reason = f"the price of a patch is one at its fit's KL weight ({weight}), not at 1"
        examined.leave_out("amortisation under the ELBO", reason)
        return Gaps(gap(run.kl_weight), None)
    return Gaps(gap(run.kl_weight), gap(1.0))


def _gap_numbers(examined: Any, gaps: Gaps) -> dict[str, float]:
    found = {}
    for name, gap in gaps._asdict().items():
        if gap is None:
            continue
        said = f"amortisation gap, {name} (KL weight {gap.kl_weight:g})"
        found[said] = gap.gap
        if gap.interval is not None:
            found |= {f"{said}, low": gap.interval.low, f"{said}, high": gap.interval.high}
    return found


def _calibration(examined: Any) -> Calibration:
    return calibrate(examined.regret, examined.run.experts, examined.thresholds.calibration)


def _calibration_verdicts(examined: Any, found: Calibration) -> Sequence[Verdict]:
    return calibration_verdicts(examined.regret, found, examined.thresholds.calibration)


def _calibration_numbers(examined: Any, c: Calibration) -> dict[str, float]:
    experts, regret = examined.run.experts, examined.regret
    values = {"stated probability": c.stated, "choices within tolerance": c.right, "ECE": c.ece}
    values |= {"ECE, tempered": c.ece_tempered, "temperature": c.temperature}
    losses = regret[[f"loss_{name}" for name in experts]]
    routed = (losses.min(axis=1) + regret["regret"]).mean()
    values["mean loss of the forced tokens, as routed (nats)"] = routed
    values |= {f"... all on {name}": losses[f"loss_{name}"].mean() for name in experts}
    return values | {
        "mean regret (nats)": regret["regret"].mean(),
        "rank correlation of entropy and regret": rank_correlation(
            regret["entropy_of_mean"], regret["regret"]
        ),
    }


def _calibration_plots(examined: Any, c: Calibration) -> Sequence[Plot]:
    tempered = f"with temperature {c.temperature:.2f}: {c.ece_tempered:.3f}."
    caption = f"ECE {c.ece:.3f}; {tempered}"
    return [Plot("Reliability", caption, lambda: verdict_plots.plot_reliability(c.before, c.after))]


def _stability(examined: Any) -> pd.DataFrame:
    return stability(examined.run.model, iter(examined.rows(examined.effort.noisy_sequences)))


def _other_text(examined: Any) -> pd.DataFrame:
    """Empty where tokens are no text, or hidden ones alone are predicted."""
    run = examined.run
    if run.tokeniser is None or not run.causal:
        return pd.DataFrame()
    own = torch.cat([batch.tokens.flatten() for batch in examined.rows(OWN_ROWS)])
    return tell_apart(run.model, own, other_texts(own, run.tokeniser), run.prior.cost_ratio)


def _other_verdicts(examined: Any, table: pd.DataFrame) -> Sequence[Verdict]:
    return [other_text_verdict(table, examined.thresholds.calibration)] if len(table) else []


def _other_numbers(examined: Any, table: pd.DataFrame) -> dict[str, float]:
    values = {}
    for _, row in table.iterrows():
        values[f"AUROC of routing entropy, {row['text']}"] = row["entropy_of_mean"]
        values[f"AUROC of nll, {row['text']}"] = row["nll"]
    return values


def _other_plots(examined: Any, table: pd.DataFrame) -> Sequence[Plot]:
    caption = "What the router's entropy tells, and what the nll tells."
    plot = Plot("Other text", caption, lambda: verdict_plots.plot_other_text(table))
    return [plot] if len(table) else []


register_diagnostic(
    Diagnostic(
        "k_hat",
        "guide",
        _k_hat,
        lambda examined, frame: k_hat_verdicts(frame, examined.thresholds.fit),
        _k_hat_numbers,
        _k_hat_plots,
    )
)
register_diagnostic(
    Diagnostic(
        "gaps",
        "amortisation",
        _gaps,
        lambda examined, gaps: [
            gap_verdict(gap, examined.thresholds.fit) for gap in gaps if gap is not None
        ],
        _gap_numbers,
    )
)
register_diagnostic(
    Diagnostic(
        "calibration",
        "calibration",
        _calibration,
        _calibration_verdicts,
        _calibration_numbers,
        _calibration_plots,
    )
)
register_diagnostic(
    Diagnostic(
        "stability",
        "stability",
        _stability,
        numbers=lambda examined, frame: {
            "routes that flip under noise of 0.1": frame["flips"].mean()
        },
    )
)
RIVAL_ROWS = 24  # windows: every second one chooses among the dial and its static rivals


def _rivals(examined: Any) -> pd.DataFrame:
    run = examined.run
    return against_static(
        run.model, examined.rows(RIVAL_ROWS), run.prior.cost_ratio.cpu(), run.experts
    )


def _rival_verdicts(examined: Any, table: pd.DataFrame) -> Sequence[Verdict]:
    good, text = sentence(table)
    advice = "" if good else "that layout: where it serves, nothing needs to be routed."
    return [Verdict("static rivals", Severity.GOOD if good else Severity.NOTE, text, advice)]


def _rival_plots(examined: Any, table: pd.DataFrame) -> Sequence[Plot]:
    caption = (
        "The fit's own weights on one expert, or on one layout, for every token; bars are 95%."
    )
    return [Plot("Dial and static rivals", caption, lambda: plot_rivals(table))]


register_diagnostic(
    Diagnostic("rivals", "static rivals", _rivals, _rival_verdicts, plots=_rival_plots)
)
register_diagnostic(
    Diagnostic(
        "other_text", "other text", _other_text, _other_verdicts, _other_numbers, _other_plots
    )
)
