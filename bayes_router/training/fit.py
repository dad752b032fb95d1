"""Training: SVI on the ELBO by a torch optimiser.

On any number of processes, resumable bit for bit on the CPU.

Batches and posterior draws of a step are functions of (seed, step) alone, so a run that stops
anywhere goes on from its last checkpoint as if it had not stopped.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bayes_router.checks import require
from bayes_router.config import Config, load_config
from bayes_router.data.load import Data, load_data
from bayes_router.files import CONFIG, SUMMARY, write_json, write_text
from bayes_router.routing.saving import save_evidence
from bayes_router.training.checkpoint import (
    check_bound,
    load_checkpoint,
    lowered,
    prepare_run,
    save_checkpoint,
)
from bayes_router.training.distributed import World, connected, pick_device
from bayes_router.training.evaluate import Evaluation
from bayes_router.training.faults import Interrupted, StopRequest, TrainingDiverged, sole_user
from bayes_router.training.fitted_text import save_fitted_text
from bayes_router.training.metrics import (
    MetricsLog,
    Reporter,
    evaluation_row,
    summarise,
    tensorboard_writer,
)
from bayes_router.training.optimise import set_peaks
from bayes_router.training.sharding import held_bytes, whole_state
from bayes_router.training.trainer import (
    CHECK_EVERY,
    ONE_AT_A_TIME,
    Objective,
    Trainer,
    count_parameters,
    svi_objective,
    untrained,
)
from bayes_router.transformer.model import RoutedLanguageModel

__all__ = [
    "Data",
    "Interrupted",
    "Objective",
    "Trainer",
    "TrainingDiverged",
    "count_parameters",
    "fit",
    "load_data",
    "pick_device",
    "svi_objective",
    "untrained",
]

LOG_EVERY = 20


def fit(
    config: Config,
    out: Path | str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    on_evaluation: Callable[[int, Evaluation], None] | None = None,
) -> tuple[RoutedLanguageModel, dict[str, Any]]:
    """Fit a routed Transformer and write its run folder.

    Under torchrun, every rank calls it and rank 0 alone writes.

    Args:
        config: the settings; `model.vocab_size` is set from the data.
        out: the run folder; with several hosts, one that all of them see.
        overwrite: replace an existing run.
        resume: continue an existing run of the same settings, or with lower learning rates where it
            diverged.
        progress: show a bar, or one line an evaluation where there is no terminal.
        on_evaluation: called with the step and each evaluation, on rank 0.

    Returns:
        The fitted model and the content of summary.json (empty on other ranks than 0).

    Raises:
        ValueError: settings, data or folder that cannot be used; nothing was changed then. Or the
            last files could not be written; the last complete checkpoint was kept.
        TrainingDiverged: loss or gradient were not finite more than `train.max_skipped` steps in a
            row.
        Interrupted: SIGTERM or Ctrl-C (a KeyboardInterrupt); the run was saved before.
    """
    require(isinstance(config, Config), "config", "a Config", type(config).__name__)
    out = Path(out)
    device = pick_device(config.train.device)
    if resume:
        check_bound(out, config)
    with connected(device) as world, _callers_generator_kept(device):
        with world.main_first():
            config, data = load_data(config)
        trainer = Trainer(config, data, device, world=world)
        with world.main_first():
            if world.main:
                prepare_run(out, config, overwrite, resume)
        with sole_user(out) if world.main else nullcontext():
            run = _Run(trainer, out, on_evaluation)
            if resume:
                run.restore()
            summary = run.train(progress and world.main)
            return run.model, summary


@contextmanager
def _callers_generator_kept(device: torch.device) -> Iterator[None]:
    """Give the caller's random state back at the end; in turn with fits in other threads."""
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with ONE_AT_A_TIME:
        fork.__enter__()
    try:
        yield
    finally:
        with ONE_AT_A_TIME:
            fork.__exit__(None, None, None)


class _Run:
    """A trainer at work in its folder."""

    def __init__(
        self, trainer: Trainer, out: Path, on_evaluation: Callable[[int, Evaluation], None] | None
    ):
        self.trainer, self.out, self.on_evaluation = trainer, out, on_evaluation
        self.world: World = trainer.world
        self.done, self.seconds, self.started = 0, 0.0, time.perf_counter()
        self.kept: int | None = None  # the step of the checkpoint in the folder
        self.log = MetricsLog(out, 0)
        self.model = trainer.model  # at the end, whole

    def restore(self) -> None:
        """Go on from the last checkpoint."""
        trainer, config = self.trainer, self.trainer.config
        saved = load_checkpoint(
            self.out, trainer.model, trainer.optimiser, config.train.steps, config
        )
        set_peaks(trainer.optimiser, config.train)
        self.done = self.kept = saved["step"]
        self.seconds = saved["seconds"]
        self.trainer.guard.restore(saved)
        self.log = MetricsLog(self.out, self.done)
        if self._takes_part and lowered(load_config(self.out / CONFIG), config):
            self._save(self.done)
            if self.world.main:
                write_text(self.out / CONFIG, config.to_toml())

    @property
    def _takes_part(self) -> bool:
        """Whether this rank helps to save: all do where parameters are cut, else rank 0 alone."""
        return self.world.main or self.trainer.config.train.shard

    def train(self, progress: bool) -> dict[str, Any]:
        """Take the steps that are left; the summary."""
        trainer, steps, evaluation = self.trainer, self.trainer.config.train.steps, None
        wanted = trainer.config.train.tensorboard and self.world.main
        events = tensorboard_writer(self.out, self.done) if wanted else None
        with StopRequest() as stop, Reporter(steps, self.done, progress, events) as reporter:
            for step in range(self.done, steps):
                try:
                    terms, extra = trainer.step(step)
                except TrainingDiverged as error:
                    raise TrainingDiverged(f"{error}; {self._what_is_kept(go_on=True)}") from None
                evaluation, row = self._evaluate(step + 1), {}
                if evaluation is not None:
                    row = evaluation_row(evaluation)
                if self._evaluates(step + 1) or step % LOG_EVERY == 0:
                    means = {
                        name: float(self.world.mean(value))
                        for name, value in terms._asdict().items()
                    }
                    row |= means | extra | {"skipped": float(trainer.guard.skipped)}
                    self.log.add(step + 1, row)
                    reporter.report(step + 1, row, evaluation)
                if step + 1 < steps:
                    self._save_between(step + 1, stop)
                reporter.step()
        return self._finish(evaluation)

    def _evaluates(self, step: int) -> bool:
        train = self.trainer.config.train
        return step == train.steps or bool(train.eval_every and step % train.eval_every == 0)

    def _evaluate(self, step: int) -> Evaluation | None:
        """The evaluation of a step that has one.

        On rank 0, while the others wait at the next step.
        """
        if not self._evaluates(step):
            return None
        model = self.trainer.whole()
        if not self.world.main:
            return None
        evaluation = self.trainer.evaluate(model)
        if self.on_evaluation is not None:
            self.on_evaluation(step, evaluation)
        return evaluation

    def _save_between(self, step: int, stop: StopRequest) -> None:
        """A checkpoint where one is due or the run is to stop.

        One that cannot be written is missed, with a warning.

        Weights whose loss is no number are not written: the checkpoint of an earlier step is worth
        more.
        """
        every, device = self.trainer.config.train.checkpoint_every, self.trainer.device
        # ranks agree to stop; between GPUs not at every step, as that would wait for the device
        asks = self.world.size == 1 or device.type == "cpu" or step % CHECK_EVERY == 0
        stops = asks and self.world.any(stop.signal is not None, device)
        if not stops and not (every and step % every == 0):
            return
        missed = ""
        sound = self._takes_part and self.trainer.sound(step)
        if self.trainer.config.train.shard:
            sound = not self.world.any(not sound, device)
        try:
            if sound:
                self._save(step)
            elif self.world.main:
                missed = f"the loss of these weights is no number; {self._what_is_kept()}"
        except OSError as error:
            if stops:
                raise self._cannot_write(error) from error
            missed = f"the checkpoint could not be written ({error})"
        if stops:
            raise Interrupted(
                f"stopped by signal {stop.signal or 'of another rank'} after step {step}; "
                f"{missed or 'the run was saved'}"
            )
        if missed:
            warnings.warn(
                f"step {step}: {missed}; training goes on and tries again at the next",
                RuntimeWarning,
                stacklevel=2,
            )

    def _what_is_kept(self, go_on: bool = False) -> str:
        if self.kept is None:
            return "there is no checkpoint yet"
        how = (
            f": --resume goes on from it, with a --train.lr below {self.trainer.config.train.lr:g}"
            if go_on
            else ""
        )
        return f"the checkpoint of step {self.kept} was kept{how}"

    def _save(self, step: int) -> None:
        trainer = self.trainer
        model, moments = trainer.whole(), whole_state(trainer.optimiser)
        if not self.world.main:
            return
        self.log.write()
        save_checkpoint(
            self.out,
            model,
            moments,
            {"step": step, "seconds": self._seconds(), **trainer.guard.state()},
            trainer.config,
        )
        self.kept = step

    def _finish(self, evaluation: Evaluation | None) -> dict[str, Any]:
        """The last files of a run."""
        trainer, world = self.trainer, self.world
        held = world.each(held_bytes(trainer.model, trainer.optimiser), trainer.device)
        self.model = trainer.whole()
        if not world.main:
            if self._takes_part:
                self._save(trainer.config.train.steps)
            return {}
        evaluation = evaluation or trainer.evaluate(self.model)
        if not all(map(math.isfinite, (*evaluation.nll.values(), evaluation.elbo))):
            lost = f"step {trainer.config.train.steps}: the loss on held-out text is no number"
            raise TrainingDiverged(f"{lost}; lower train.lr; {self._what_is_kept(go_on=True)}")
        run = {
            "parameters": count_parameters(trainer.model),
            "seconds": round(self._seconds(), 1),
            "device": str(trainer.device),
            "processes": self.world.size,
            "skipped_steps": int(trainer.guard.skipped),
        }
        if world.size > 1:
            run["held_bytes_per_rank"] = [round(value) for value in held]
        summary = summarise(trainer.config, trainer.data, evaluation, run)
        evidence = trainer.fit_evidence(self.model)
        try:
            self._save(trainer.config.train.steps)
            save_evidence(self.out, evidence)
            save_fitted_text(self.out, trainer.data.train)
            write_json(self.out / SUMMARY, summary)
        except OSError as error:
            raise self._cannot_write(error) from error
        return summary

    def _cannot_write(self, error: OSError) -> ValueError:
        return ValueError(
            f"out: expected to write to {self.out}; got: {error}; the last complete checkpoint was "
            f"kept; make room, then resume"
        )

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.started
