"""All diagnostics of a run in one call.

The frames, the verdicts, and how long a text each of them reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import pandas as pd
import torch

from bayes_router.checks import one_line, require
from bayes_router.data.load import load_data
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.diagnostics import standard  # noqa: F401, registers the library's own
from bayes_router.diagnostics.diagnostic import Diagnostic, diagnostics
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.diagnostics.measures.calibration import CalibrationThresholds
from bayes_router.diagnostics.measures.collapse import CollapseSummary
from bayes_router.diagnostics.measures.collapse_verdicts import (
    CollapseThresholds,
    collapse_over_training,
)
from bayes_router.diagnostics.measures.k_hat import FitThresholds
from bayes_router.diagnostics.measures.kinds import kinds_of_vocabulary
from bayes_router.diagnostics.measures.regret import routing_regret
from bayes_router.diagnostics.measures.uncertainty import UncertaintySummary
from bayes_router.diagnostics.measures.verdict import Verdict
from bayes_router.diagnostics.reading import read, windows
from bayes_router.files import METRICS
from bayes_router.progress import Progress
from bayes_router.types import IGNORED


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
    gap_sequences: int = 8
    gap_length: int = 128
    gap_steps: int = 60
    noisy_sequences: int = 16


@dataclass(frozen=True)
class Thresholds:
    """Where the verdicts of each diagnostic begin."""

    collapse: CollapseThresholds = CollapseThresholds()
    fit: FitThresholds = FitThresholds()
    calibration: CalibrationThresholds = CalibrationThresholds()


PATCHED = Effort(
    regret_sequences=16,
    guide_sequences=2,
    guide_draws=100,
    gap_sequences=4,
    gap_length=32,
    gap_steps=20,
    noisy_sequences=4,
)
"""Of a pretrained model, whose passes cost far more than those of a small one."""


class Examination:
    """The diagnostics of a run on held-out text, each computed when it is first asked for.

    Verdicts, figures to quote and reports hold what could be computed; `left_out` says what could
    not, and why.

    Args:
        run: the run.
        source: held-out data; the run's own by default.
        effort: how much is read.
        thresholds: of the verdicts.

    Raises:
        ValueError: units of the fit are frozen, and have no posterior.
    """

    def __init__(
        self,
        run: FittedRun,
        source: TokenSource | None = None,
        effort: Effort | None = None,
        thresholds: Thresholds | None = None,
    ):
        frozen = getattr(run.model, "frozen", None)
        got = None if frozen is None else f"{frozen.number} frozen"
        require(frozen is None, "run", "a fit whose units all choose", got, "thaw it first")
        self.run, self.thresholds = run, thresholds or Thresholds()
        self.effort = effort or (PATCHED if run.patched else Effort())
        self.source = source or run.held_out or load_data(run.config)[1].valid
        # once the text was read: nats under HARD and scored tokens of each window, [W, 2]; and a
        # number that tells its text from another, [W]
        self.window_nll, self.window_print = torch.empty(0, 2), torch.empty(0)
        self._failed: dict[str, str] = {}
        self._results: dict[str, Any] = {}

    def attempt(self, part: str) -> Any:
        """The attribute called `part`, or None where it cannot be had.

        The hours spent on the others are not lost with it.
        """
        if part not in self._failed:
            try:
                return getattr(self, part)
            # of whatever kind: a package that is missing, memory that ends
            except Exception as error:
                self.leave_out(part, error)
        return None

    def leave_out(self, part: str, reason: Exception | str) -> None:
        """Note that `part`, an attribute or a figure, is not shown for this reason."""
        self._failed[part] = one_line(reason) or type(reason).__name__

    def read(self, quick: bool = False, progress: Progress | None = None) -> None:
        """Compute everything, part after part.

        Ctrl-C ends it: what was read until then stands, and the rest is left out.
        """
        progress = progress or Progress("reading", shown=False)
        parts = {} if quick else diagnostics()
        progress.say("uncertainty, collapse")
        _ = self.collapse  # without it there is nothing to show
        progress.step()
        for part, diagnostic in parts.items():
            progress.say(diagnostic.title)
            try:
                self.attempt(part)
            except KeyboardInterrupt:
                started = list(parts).index(part)
                self._failed.update({late: "interrupted" for late in list(parts)[started:]})
                return
            progress.step()

    @property
    def nll(self) -> float:
        """Under HARD, nats per scored token."""
        _ = self.collapse
        return float(self.window_nll[:, 0].sum() / self.window_nll[:, 1].sum())

    def rows(self, count: int) -> list[Batch]:
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
        lost, prints = [], []
        for reading in read(run.model, windows(self.source, run.config, self.effort.tokens)):
            uncertainty.add(reading)
            collapse.add(reading)
            scored = (reading.targets != IGNORED).sum(1)
            lost.append(torch.stack([reading.nll.double().sum(1), scored.double()], 1).cpu())
            places = torch.arange(1, reading.tokens.shape[1] + 1, device=reading.tokens.device)
            prints.append((reading.tokens * places).sum(1).cpu())
        self.window_nll, self.window_print = torch.cat(lost), torch.cat(prints)
        return uncertainty, collapse

    @property
    def uncertainty(self) -> UncertaintySummary:
        """How sure the posterior is, by layer, position and kind of token."""
        return self._summaries[0]

    @property
    def collapse(self) -> CollapseSummary:
        """The collapses, by layer."""
        return self._summaries[1]

    @cached_property
    def training(self) -> pd.DataFrame:
        """`collapse_over_training` of the run's log; empty where there is none."""
        path = self.run.path / METRICS
        if not path.is_file():
            return pd.DataFrame()
        try:
            return collapse_over_training(
                pd.read_csv(path), self.run.experts, self.thresholds.collapse
            )
        # whatever a damaged table makes pandas say
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise ValueError(
                f"{path}: expected the metrics of this run; it is damaged; {one_line(error)}"
            ) from error

    @cached_property
    def regret(self) -> pd.DataFrame:
        """`routing_regret`."""
        batches = self.rows(self.effort.regret_sequences)
        return routing_regret(
            self.run.model, batches, self.effort.regret_per_sequence, causal=self.run.causal
        )

    def result(self, name: str) -> Any:
        """What the registered diagnostic `name` found, read when it is first asked for.

        Also as an attribute.
        """
        if name not in self._results:
            self._results[name] = diagnostics()[name].read(self)
        return self._results[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in diagnostics():
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: neither its own nor a registered "
                f"diagnostic"
            )
        return self.result(name)

    def found(self) -> Iterator[tuple[Diagnostic, Any]]:
        """Every diagnostic that could be read, and what it found."""
        for name, diagnostic in diagnostics().items():
            result = self.attempt(name)
            if result is not None:
                yield diagnostic, result

    def verdicts(self, quick: bool = False) -> list[Verdict]:
        """Every finding, the collapses first.

        `quick` leaves out what needs more than one reading of the text.
        """
        found = self.collapse.verdicts(self.thresholds.collapse)
        if quick:
            return found
        for diagnostic, result in self.found():
            found += diagnostic.verdicts(self, result)
        return [verdict if verdict.basis else self._based(verdict) for verdict in found]

    def _based(self, verdict: Verdict) -> Verdict:
        """What a verdict was read from; intervals stand in its sentence."""
        effort, context = self.effort, self.run.config.data.context
        length = min(effort.gap_length, context)
        basis = {
            "guide": f"{effort.guide_sequences} windows, {effort.guide_draws} draws each",
            "amortisation": f"{effort.gap_sequences} windows of {length} tokens",
            "calibration": f"{effort.regret_sequences} windows",
            "regret": f"{effort.regret_sequences} windows",
            "other text": f"{standard.OWN_ROWS} windows of the fit's text",
        }.get(verdict.topic, "")
        return verdict._replace(basis=basis and f"from {basis}")

    def left_out(self, quick: bool = False) -> list[str]:
        """What is not said of this fit, and why."""
        found, experts, training = [], len(self.run.experts), self.attempt("training")
        if training is None:
            found.append(f"over training, cost against nll: {self._failed['training']}")
        elif not len(training):
            kept = (
                "a patch keeps no log of evaluations"
                if self.run.patched
                else f"the run has no {METRICS}"
            )
            found.append(f"over training, cost against nll: {kept}")
        if experts != 3:
            found.append(
                f"posteriors on the simplex: a triangle has three corners, and there are {experts} "
                f"experts"
            )
        if quick:
            found.append(
                "guide, amortisation, calibration, other text: they need more than one reading "
                "(--quick)"
            )
        if self.run.tokeniser is None:
            of = (
                "the patched model came without a tokenizer"
                if self.run.patched
                else "the tokens of recall are no text"
            )
            found.append(f"kinds of token{'' if quick else ', other text'}: {of}")
        if not self.run.causal and not quick:
            found.append(
                "guide of a prefix, other text: an encoder reads both sides and predicts hidden "
                "tokens alone"
            )
        titles = {name: diagnostic.title for name, diagnostic in diagnostics().items()}
        failed = {
            titles.get(part, part): reason
            for part, reason in self._failed.items()
            if part != "training"
        }
        return found + [f"{name}: {reason}" for name, reason in failed.items()]

    def figures(self) -> pd.Series:
        """The numbers to quote."""
        values: dict[str, float] = {}
        for diagnostic, result in self.found():
            values |= diagnostic.numbers(self, result)
        return pd.Series(values, name="value", dtype=float)
