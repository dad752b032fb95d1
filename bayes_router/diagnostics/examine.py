"""All diagnostics of a run in one call: the frames, the verdicts, and how long a text each of them reads."""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bayes_router.checks import require
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
from bayes_router.training.fit import load_data


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


class Gaps(NamedTuple):
    """The amortisation gap under the objective of training, and under the ELBO."""

    trained: AmortisationGap
    elbo: AmortisationGap


class Examination:
    """The diagnostics of a run on held-out text, each computed when it is first asked for.

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
        return collapse_over_training(pd.read_csv(path), self.run.experts, self.thresholds.collapse)

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
        found += k_hat_verdicts(self.k_hat, self.thresholds.fit)
        found += [gap_verdict(gap, self.thresholds.fit) for gap in self.gaps]
        found += calibration_verdicts(self.regret, self.calibration, self.thresholds.calibration)
        if len(self.other_text):
            found.append(other_text_verdict(self.other_text, self.thresholds.calibration))
        return found

    def left_out(self, quick: bool = False) -> list[str]:
        """What is not said of this fit, and why."""
        found, experts = [], len(self.run.experts)
        if not len(self.training):
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
        return found

    def figures(self) -> pd.Series:
        """The numbers to quote."""
        median = self.k_hat.groupby(["target", "length"], as_index=False)["k_hat"].median()
        values = {f"k-hat, {row.target}, {row.length} tokens (median)": row.k_hat for row in median.itertuples()}
        last = self.k_hat[self.k_hat["target"] == "joint"].dropna(axis=1).groupby("length").mean(numeric_only=True).iloc[-1]
        values |= {f"{name} (nats per token)": last[name] for name in last.index if name.startswith("bound_")}
        for name, gap in self.gaps._asdict().items():
            values[f"amortisation gap, {name} (KL weight {gap.kl_weight:g})"] = gap.gap
        c = self.calibration
        values |= {"stated probability": c.stated, "choices within tolerance": c.right, "ECE": c.ece}
        values |= {"ECE, tempered": c.ece_tempered, "temperature": c.temperature}
        losses = self.regret[[f"loss_{name}" for name in self.run.experts]]
        values["mean loss of the forced tokens, as routed (nats)"] = (losses.min(axis=1) + self.regret["regret"]).mean()
        values |= {f"... all on {name}": losses[f"loss_{name}"].mean() for name in self.run.experts}
        values |= {
            "mean regret (nats)": self.regret["regret"].mean(),
            "rank correlation of entropy and regret": rank_correlation(self.regret["entropy_of_mean"], self.regret["regret"]),
            "routes that flip under noise of 0.1": self.stability["flips"].mean(),
        }
        for _, row in self.other_text.iterrows():
            values[f"AUROC of routing entropy, {row['text']}"] = row["entropy_of_mean"]
            values[f"AUROC of nll, {row['text']}"] = row["nll"]
        return pd.Series(values, name="value", dtype=float)
