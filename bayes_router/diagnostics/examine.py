"""All diagnostics of a run in one call: the frames, the verdicts, and how long a text each of them reads."""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bayes_router.checks import one_line, require
from bayes_router.data.load import load_data
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.diagnostics.measures.amortisation import AmortisationGap, amortisation_gap, gap_verdict
from bayes_router.diagnostics.measures.calibration import (
    Calibration,
    CalibrationThresholds,
    calibrate,
    calibration_verdicts,
    rank_correlation,
    routing_regret,
    stability,
)
from bayes_router.diagnostics.measures.collapse import CollapseSummary, CollapseThresholds, collapse_over_training
from bayes_router.diagnostics.measures.importance import FitThresholds, k_hat_frame, k_hat_verdicts
from bayes_router.diagnostics.measures.other_text import other_text_verdict, other_texts, tell_apart
from bayes_router.diagnostics.measures.uncertainty import UncertaintySummary, kinds_of_vocabulary
from bayes_router.diagnostics.measures.verdict import Verdict
from bayes_router.diagnostics.reading import read, windows
from bayes_router.files import METRICS
from bayes_router.progress import Progress


@dataclass(frozen=True)
class Effort:
    """How much each diagnostic reads.

    Attributes:
        tokens: for uncertainty and collapse; None is the run's eval_tokens.
        regret_sequences: windows in which routes are forced.
        regret_per_sequence: (token, layer) pairs forced in each.
        guide_sequences: for k-hat.
        guide_draws: for each of them.
        guide_lengths: prefixes whose k-hat is taken; what exceeds the context is left out.
        gap_sequences: for the amortisation gap.
        gap_length: tokens of each that are fitted, at most.
        gap_steps: of their own fit.
        noisy_sequences: for stability.
    """

    tokens: int | None = None
    regret_sequences: int = 32
    regret_per_sequence: int = 8
    guide_sequences: int = 4
    guide_draws: int = 300
    guide_lengths: tuple[int, ...] = (1, 4, 16, 64)
    gap_sequences: int = 2
    gap_length: int = 128
    gap_steps: int = 60
    noisy_sequences: int = 16


@dataclass(frozen=True)
class Thresholds:
    """Of all verdicts."""

    collapse: CollapseThresholds = CollapseThresholds()
    fit: FitThresholds = FitThresholds()
    calibration: CalibrationThresholds = CalibrationThresholds()


PATCHED = Effort(
    regret_sequences=16, guide_sequences=2, guide_draws=100, gap_sequences=1, gap_length=64, gap_steps=20, noisy_sequences=4
)
"""Of a pretrained model, whose passes cost far more than those of a small one."""


COSTLY = {
    "k_hat": "guide",
    "gaps": "amortisation",
    "calibration": "calibration",
    "stability": "stability",
    "other_text": "other text",
}
"""What needs more than one reading of the text: attributes of an `Examination`, and what a report calls them."""


class Gaps(NamedTuple):
    """The amortisation gap under the objective of training, and under the ELBO."""

    trained: AmortisationGap
    elbo: AmortisationGap


class Examination:
    """The diagnostics of a run on held-out text, each computed when it is first asked for.

    Verdicts, figures to quote and reports hold what could be computed; `left_out` says what could not, and why.

    Args:
        run: the run.
        source: held-out data; the run's own by default.
        effort: how much is read.
        thresholds: of the verdicts.
    """

    def __init__(
        self,
        run: FittedRun,
        source: TokenSource | None = None,
        effort: Effort | None = None,
        thresholds: Thresholds | None = None,
    ):
        self.run, self.thresholds = run, thresholds or Thresholds()
        self.effort = effort or (PATCHED if run.patched else Effort())
        self.source = source or run.held_out or load_data(run.config)[1].valid
        self._failed: dict[str, str] = {}

    def attempt(self, part: str) -> Any:
        """The attribute called `part`, or None where it cannot be had: the hours spent on the others are not lost with it."""
        if part not in self._failed:
            try:
                return getattr(self, part)
            except Exception as error:  # of whatever kind: a package that is missing, memory that ends
                self.leave_out(part, error)
        return None

    def leave_out(self, part: str, error: Exception) -> None:
        """Note that `part`, an attribute or a figure, is not shown for this reason."""
        self._failed[part] = one_line(error) or type(error).__name__

    def read(self, quick: bool = False, progress: Progress | None = None) -> None:
        """Compute everything, part after part. Ctrl-C ends it: what was read until then stands, and the rest is left out."""
        progress = progress or Progress("reading", shown=False)
        parts = {} if quick else COSTLY
        progress.say("uncertainty, collapse")
        _ = self.collapse  # without it there is nothing to show
        progress.step()
        for part, name in parts.items():
            progress.say(name)
            try:
                self.attempt(part)
            except KeyboardInterrupt:
                started = list(parts).index(part)
                self._failed.update({late: "interrupted" for late in list(parts)[started:]})
                return
            progress.step()

    def _rows(self, count: int) -> list[Batch]:
        """The first `count` windows, one a batch, where the model is."""
        context, device = self.run.config.data.context, self.run.device
        windows = islice(self.source.windows(context, 1), count)
        return [Batch(tokens.to(device), targets.to(device)) for tokens, targets in windows]

    @cached_property
    def _summaries(self) -> tuple[UncertaintySummary, CollapseSummary]:
        """Both in one reading of the text."""
        run, tokeniser = self.run, self.run.tokeniser
        kinds = None if tokeniser is None else kinds_of_vocabulary(tokeniser)
        uncertainty = UncertaintySummary(run.prior.cost_ratio, kinds)
        collapse = CollapseSummary(run.program, run.experts)
        for reading in read(run.model, windows(self.source, run.config, self.effort.tokens)):
            uncertainty.add(reading)
            collapse.add(reading)
        return uncertainty, collapse

    @property
    def uncertainty(self) -> UncertaintySummary:
        """By layer, position and kind of token."""
        return self._summaries[0]

    @property
    def collapse(self) -> CollapseSummary:
        """By layer."""
        return self._summaries[1]

    @cached_property
    def training(self) -> pd.DataFrame:
        """`collapse_over_training` of the run's log; empty where there is none."""
        path = self.run.path / METRICS
        if not path.is_file():
            return pd.DataFrame()
        try:
            return collapse_over_training(pd.read_csv(path), self.run.experts, self.thresholds.collapse)
        except (ValueError, LookupError, TypeError, OSError) as error:  # whatever a damaged table makes pandas say
            raise ValueError(f"{path}: expected the metrics of this run; it is damaged; {one_line(error)}") from error

    @cached_property
    def regret(self) -> pd.DataFrame:
        """`routing_regret`."""
        batches = self._rows(self.effort.regret_sequences)
        return routing_regret(self.run.model, batches, self.effort.regret_per_sequence, causal=self.run.causal)

    @cached_property
    def calibration(self) -> Calibration:
        """`calibrate`."""
        return calibrate(self.regret, self.run.experts, self.thresholds.calibration)

    @cached_property
    def stability(self) -> pd.DataFrame:
        """`stability`."""
        return stability(self.run.model, iter(self._rows(self.effort.noisy_sequences)))

    @cached_property
    def k_hat(self) -> pd.DataFrame:
        """`k_hat_frame`."""
        effort, context = self.effort, self.run.config.data.context
        sequences = [(batch.tokens[0], batch.targets[0]) for batch in self._rows(effort.guide_sequences)]
        lengths = [length for length in effort.guide_lengths if length <= context] if self.run.causal else [context]
        require(len(lengths) > 0, "guide_lengths", f"one of at most {context} tokens", effort.guide_lengths)
        return k_hat_frame(
            self.run.program, self.run.guide, sequences, lengths, effort.guide_draws, kl_weight=self.run.kl_weight
        )

    @cached_property
    def gaps(self) -> Gaps:
        """`amortisation_gap`, at the KL weight of training and at 1."""
        rows = self._rows(self.effort.gap_sequences)
        tokens, targets = (torch.cat(column)[:, : self.effort.gap_length] for column in zip(*rows, strict=True))
        trained, elbo = (
            amortisation_gap(self.run.program, self.run.guide, tokens, targets, kl_weight=weight, steps=self.effort.gap_steps)
            for weight in (self.run.kl_weight, 1.0)
        )
        return Gaps(trained, elbo)

    @cached_property
    def other_text(self) -> pd.DataFrame:
        """`tell_apart`; empty where tokens are no text, or hidden ones alone are predicted."""
        tokeniser = self.run.tokeniser
        if tokeniser is None or not self.run.causal:
            return pd.DataFrame()
        own = self._own_tokens()
        return tell_apart(self.run.model, own, other_texts(own, tokeniser), self.run.prior.cost_ratio)

    def _own_tokens(self) -> Tensor:
        return torch.cat([batch.tokens.flatten() for batch in self._rows(32)])

    def verdicts(self, quick: bool = False) -> list[Verdict]:
        """Every finding, the collapses first; `quick` leaves out what needs more than one reading of the text."""
        found = self.collapse.verdicts(self.thresholds.collapse)
        if quick:
            return found
        if (k_hat := self.attempt("k_hat")) is not None:
            found += k_hat_verdicts(k_hat, self.thresholds.fit)
        found += [gap_verdict(gap, self.thresholds.fit) for gap in self.attempt("gaps") or ()]
        if (calibration := self.attempt("calibration")) is not None:
            found += calibration_verdicts(self.regret, calibration, self.thresholds.calibration)
        other = self.attempt("other_text")
        if other is not None and len(other):
            found.append(other_text_verdict(other, self.thresholds.calibration))
        return found

    def left_out(self, quick: bool = False) -> list[str]:
        """What is not said of this fit, and why."""
        found, experts, training = [], len(self.run.experts), self.attempt("training")
        if training is None:
            found.append(f"over training, cost against nll: {self._failed['training']}")
        elif not len(training):
            kept = "a patch keeps no log of evaluations" if self.run.patched else f"the run has no {METRICS}"
            found.append(f"over training, cost against nll: {kept}")
        if experts != 3:
            found.append(f"posteriors on the simplex: a triangle has three corners, and there are {experts} experts")
        if quick:
            found.append("guide, amortisation, calibration, other text: they need more than one reading (--quick)")
        if self.run.tokeniser is None:
            of = "the patched model came without a tokenizer" if self.run.patched else "the tokens of recall are no text"
            found.append(f"kinds of token{'' if quick else ', other text'}: {of}")
        if not self.run.causal and not quick:
            found.append("guide of a prefix, other text: an encoder reads both sides and predicts hidden tokens alone")
        failed = {COSTLY.get(part, part): reason for part, reason in self._failed.items() if part != "training"}
        return found + [f"{name}: {reason}" for name, reason in failed.items()]

    def figures(self) -> pd.Series:
        """The numbers to quote."""
        values = {**self._guide_figures(), **self._calibration_figures()}
        if (steady := self.attempt("stability")) is not None:
            values["routes that flip under noise of 0.1"] = steady["flips"].mean()
        other = self.attempt("other_text")
        for _, row in other.iterrows() if other is not None else ():
            values[f"AUROC of routing entropy, {row['text']}"] = row["entropy_of_mean"]
            values[f"AUROC of nll, {row['text']}"] = row["nll"]
        return pd.Series(values, name="value", dtype=float)

    def _guide_figures(self) -> dict[str, float]:
        values: dict[str, float] = {}
        if (k_hat := self.attempt("k_hat")) is not None:
            median = k_hat.groupby(["target", "length"], as_index=False)["k_hat"].median()
            values |= {f"k-hat, {row.target}, {row.length} tokens (median)": row.k_hat for row in median.itertuples()}
            last = k_hat[k_hat["target"] == "joint"].dropna(axis=1).groupby("length").mean(numeric_only=True).iloc[-1]
            values |= {f"{name} (nats per token)": last[name] for name in last.index if name.startswith("bound_")}
        if (gaps := self.attempt("gaps")) is not None:
            for name, gap in gaps._asdict().items():
                values[f"amortisation gap, {name} (KL weight {gap.kl_weight:g})"] = gap.gap
        return values

    def _calibration_figures(self) -> dict[str, float]:
        if (c := self.attempt("calibration")) is None:
            return {}
        values = {"stated probability": c.stated, "choices within tolerance": c.right, "ECE": c.ece}
        values |= {"ECE, tempered": c.ece_tempered, "temperature": c.temperature}
        losses = self.regret[[f"loss_{name}" for name in self.run.experts]]
        values["mean loss of the forced tokens, as routed (nats)"] = (losses.min(axis=1) + self.regret["regret"]).mean()
        values |= {f"... all on {name}": losses[f"loss_{name}"].mean() for name in self.run.experts}
        return values | {
            "mean regret (nats)": self.regret["regret"].mean(),
            "rank correlation of entropy and regret": rank_correlation(self.regret["entropy_of_mean"], self.regret["regret"]),
        }
