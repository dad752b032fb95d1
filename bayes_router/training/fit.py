"""Training: SVI on the ELBO by a torch optimiser, resumable bit for bit on the CPU.

Batches and posterior draws of a step are functions of (seed, step) alone, so a run that stops anywhere goes on from its
last checkpoint as if it had not stopped.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayes_router.config import Config, ModelConfig, require, with_changes
from bayes_router.data.recall import RecallData
from bayes_router.data.tokens import TokenSource, text_data
from bayes_router.inference.elbo import NegativeELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.schedule import Schedule, ScheduleState
from bayes_router.training.checkpoint import (
    METRICS,
    SUMMARY,
    load_checkpoint,
    prepare_run,
    save_checkpoint,
    write_json,
    write_whole,
)
from bayes_router.training.evaluate import Evaluation, evaluate
from bayes_router.training.optimise import build_optimiser, clip_gradient, set_learning_rate
from bayes_router.transformer.layer import build_prior
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import LossTerms

LOG_EVERY = 20


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite; the last good checkpoint was kept."""


@dataclass(frozen=True)
class Data:
    """What a run reads, and what identifies it."""

    train: TokenSource
    valid: TokenSource
    name: str
    sha256: str
    tokens: int  # of training text; 0 for a generator, which has no end


def load_data(config: Config) -> tuple[Config, Data]:
    """The data of a configuration, and the configuration with the vocabulary that the data needs."""
    if config.data.corpus == "recall":
        recall = RecallData()
        require(
            config.data.context >= recall.min_context,
            "data.context",
            f"at least {recall.min_context} for corpus recall",
            config.data.context,
        )
        return with_changes(config, {"model.vocab_size": recall.vocab_size}), Data(recall, recall, "recall", "", 0)
    text = text_data(config.data.corpus, config.data.tokeniser, config.data.valid_fraction)
    data = Data(text.train, text.valid, text.corpus, text.sha256, len(text.train))
    # the shortest window that both parts can give is checked before anything is written
    next(iter(text.valid.windows(config.data.context, 1, max(config.data.eval_tokens, config.data.context))))
    text.train.batch(0, 1, config.data.context, config.train.seed)
    return with_changes(config, {"model.vocab_size": text.tokeniser.vocab_size}), data


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        ValueError: torch knows no such device, or has none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(
            f"train.device: expected auto, cpu or a device that torch has here; got {name!r}: {message}"
        ) from error
    return device


class Objective(Protocol):
    """What a trainer minimises: a module with parameters of the model inside."""

    def __call__(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms]:
        """The loss, and its parts in nats per token."""

    def follow(self, state: ScheduleState) -> None:
        """Move to what the schedule says."""


def svi_objective(model: RoutedLanguageModel, start: ScheduleState, cost_ratio: Tensor) -> Objective:
    """The negative ELBO of `model` under the prior of `start`."""
    program = RoutingModel(model.network, start.concentration, cost_ratio, start.kl_weight, start.price)
    return NegativeELBO(program, RoutingGuide(program, model.controller))


class Trainer:
    """One fit: the model, the objective, the optimiser and the schedule, moved a step at a time.

    `build_model` and `build_objective` are there for studies that compare: contenders differ in these two alone.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        device: torch.device,
        build_model: Callable[[Config], RoutedLanguageModel] = RoutedLanguageModel.from_config,
        build_objective: Callable[[RoutedLanguageModel, ScheduleState, Tensor], Objective] = svi_objective,
    ):
        self.config, self.data, self.device = config, data, device
        torch.manual_seed(config.train.seed)
        self.model = build_model(config).to(device)
        self.prior = build_prior(config.prior, config.model, config.model.num_layers, config.data.context)
        self.schedule = Schedule(config.schedule, self.prior, config.train.steps, config.model.experts, config.prior.price)
        start = self.schedule.at(0)
        self.model.controller.start_at(start.concentration.to(device))
        self.objective = build_objective(self.model, start, self.prior.cost_ratio.to(device))
        self.optimiser = build_optimiser(self.model, config.train)

    def step(self, step: int) -> tuple[LossTerms, dict[str, float]]:
        """One update; the terms of the loss and what else a log wants."""
        config, state = self.config.train, self.schedule.at(step)
        self.objective.follow(state)
        lr = set_learning_rate(self.optimiser, config, step)
        tokens, targets = self.data.train.batch(step, config.batch_size, self.config.data.context, config.seed)
        torch.manual_seed(_draw_seed(config.seed, step))
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
        with autocast:
            loss, terms = self.objective(tokens.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradient(self.model, config.clip)
        if step % LOG_EVERY == 0 or step == config.steps - 1:
            self._check_finite(step, loss.detach(), norm)
        self.optimiser.step()
        return terms, {"lr": lr, "kl_weight": state.kl_weight, "price": state.price}

    def _check_finite(self, step: int, loss: Tensor, norm: Tensor) -> None:
        if bool(torch.isfinite(loss) & torch.isfinite(norm)):
            return
        bad = [name for name, p in self.model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        raise TrainingDiverged(
            f"step {step}: loss {float(loss):.4g}, gradient norm {float(norm):.4g}; not finite in "
            f"{', '.join(bad[:3]) or 'the loss'}; the last checkpoint was kept; lower train.lr or raise model.concentration_floor"
        )

    def evaluate(self) -> Evaluation:
        """Read the model on held-out data."""
        config = self.config
        return evaluate(
            self.model,
            self.data.valid,
            self.prior.concentration,
            context=config.data.context,
            batch_size=config.train.batch_size,
            limit=max(config.data.eval_tokens, config.data.context),
        )


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

    Args:
        config: the settings; `model.vocab_size` is set from the data.
        out: the run folder.
        overwrite: replace an existing run.
        resume: continue an existing run of the same settings.
        progress: show a bar.
        on_evaluation: called with the step and each evaluation.

    Returns:
        The fitted model and the content of summary.json.

    Raises:
        ValueError: settings, data or folder that cannot be used; nothing was changed then.
        TrainingDiverged: the loss is not finite.
    """
    out = Path(out)
    config, data = load_data(config)
    device = pick_device(config.train.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        trainer = Trainer(config, data, device)
        prepare_run(out, config, overwrite, resume)
        saved: dict[str, Any] = (
            load_checkpoint(out, trainer.model, trainer.optimiser) if resume else {"step": 0, "seconds": 0.0}
        )
        log = MetricsLog(out, saved["step"] if resume else 0)
        return trainer.model, _run(trainer, log, out, saved, progress, on_evaluation)


def _run(
    trainer: Trainer,
    log: "MetricsLog",
    out: Path,
    saved: dict[str, Any],
    progress: bool,
    on_evaluation: Callable[[int, Evaluation], None] | None,
) -> dict[str, Any]:
    train, started, before = trainer.config.train, time.perf_counter(), saved["seconds"]
    evaluation: Evaluation | None = None

    def seconds() -> float:
        return before + time.perf_counter() - started

    def checkpoint(step: int) -> None:
        log.write()
        save_checkpoint(out, trainer.model, trainer.optimiser, {"step": step, "seconds": seconds()})

    with tqdm(total=train.steps, initial=saved["step"], disable=not progress, unit="step", dynamic_ncols=True) as bar:
        for step in range(saved["step"], train.steps):
            terms, extra = trainer.step(step)
            last, row = step == train.steps - 1, {}
            if last or (train.eval_every and (step + 1) % train.eval_every == 0):
                evaluation = trainer.evaluate()
                row = evaluation_row(evaluation)
                if on_evaluation is not None:
                    on_evaluation(step + 1, evaluation)
            if row or step % LOG_EVERY == 0:
                row |= {name: float(value) for name, value in terms._asdict().items()} | extra
                log.add(step + 1, row)
                bar.set_postfix_str(_postfix(row, evaluation), refresh=False)
            if not last and train.checkpoint_every and (step + 1) % train.checkpoint_every == 0:
                checkpoint(step + 1)
            bar.update()
    evaluation = evaluation or trainer.evaluate()
    checkpoint(train.steps)
    summary = summarise(trainer, evaluation, seconds())
    write_json(out / SUMMARY, summary)
    return summary


def _postfix(row: dict[str, float], evaluation: Evaluation | None) -> str:
    cost = "" if evaluation is None else f" hard {evaluation.nll['hard']:.3f} at cost {evaluation.cost_ratio['paper']:.3f}"
    return f"nll {row['nll']:.3f} kl {row['kl']:.2f}{cost}"


def _draw_seed(seed: int, step: int) -> int:
    """Another stream for every step."""
    return (seed * 1_000_003 + step) * 2_654_435_761 % 2**63


class MetricsLog:
    """metrics.csv: one row a logged step; rows after the step that a run resumes from are dropped."""

    def __init__(self, out: Path, step: int):
        self.path = out / METRICS
        self.rows: list[dict[str, float]] = []
        if step and self.path.exists():
            frame = pd.read_csv(self.path)
            self.rows = frame[frame["step"] <= step].to_dict("records")

    def add(self, step: int, row: dict[str, float]) -> None:
        """Keep a row."""
        self.rows.append({"step": step, **row})

    def write(self) -> None:
        """Write all rows."""
        frame = pd.DataFrame(self.rows)
        write_whole(self.path, lambda p: frame.to_csv(p, index=False))


def evaluation_row(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation as flat columns."""
    row = {f"valid_nll_{mode}": value for mode, value in evaluation.nll.items()} | {"valid_elbo": evaluation.elbo}
    row |= {f"cost_{name}": value for name, value in evaluation.cost_ratio.items()}
    for layer, load in enumerate(evaluation.load_per_layer):
        row |= {f"load_{layer}_{name}": share for name, share in zip(evaluation.experts, load, strict=True)}
        row[f"route_information_{layer}"] = evaluation.route_information_per_layer[layer]
        row[f"kl_{layer}"] = evaluation.kl_per_layer[layer]
        row[f"total_concentration_{layer}"] = evaluation.total_concentration_per_layer[layer]
    return row


def summarise(trainer: Trainer, evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    """The content of summary.json."""
    config, data = trainer.config, trainer.data
    return {
        "corpus": {"name": data.name, "sha256": data.sha256, "tokens": data.tokens},
        "seed": config.train.seed,
        "steps": config.train.steps,
        "tokens_seen": config.train.steps * config.train.batch_size * config.data.context,
        "parameters": count_parameters(trainer.model),
        "seconds": round(seconds, 1),
        "device": str(trainer.device),
        **evaluation.to_dict(),
    }


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def untrained(config: ModelConfig, seed: int = 0) -> RoutedLanguageModel:
    """A model at its initial weights, the generator of the caller left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RoutedLanguageModel(config)
