"""One fit, a step at a time.

Batches and posterior draws of a step are functions of the seed, the step and the rank.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.config import Config, ModelConfig
from bayes_router.data.load import Data
from bayes_router.data.tokens import Batch
from bayes_router.inference.draws import RowDraws
from bayes_router.inference.elbo import NegativeELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.evidence import Evidence
from bayes_router.routing.schedule import Schedule, ScheduleState
from bayes_router.training.distributed import World
from bayes_router.training.evaluate import Evaluation, evaluate
from bayes_router.training.evidence import FIT_TOKENS, fit_evidence, training_batches
from bayes_router.training.execution import Execution
from bayes_router.training.faults import StepGuard, all_finite
from bayes_router.training.graph import GraphedGradient, wants_graph
from bayes_router.training.optimise import build_optimiser, clip_gradient, set_learning_rate
from bayes_router.training.sharding import gather_gradients, shard, whole_model
from bayes_router.transformer.build import build_prior
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import LossTerms

CHECK_EVERY = 20
"""Steps between two looks at the device: on a GPU each waits for it."""

ONE_AT_A_TIME = threading.RLock()
"""Pyro's stack of handlers and torch's generator are the process's: fits in several threads take
turns at them."""


class Objective(Protocol):
    """What a trainer minimises: a module with parameters of the model inside."""

    def __call__(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms]:
        """The loss, and its parts in nats per token."""

    def follow(self, state: ScheduleState) -> None:
        """Move to what the schedule says."""


def svi_objective(
    model: RoutedLanguageModel, start: ScheduleState, cost_ratio: Tensor
) -> Objective:
    """The negative ELBO of `model` under the prior of `start`."""
    program = RoutingModel(model.network, start.concentration, cost_ratio, start.price)
    return NegativeELBO(program, RoutingGuide(program, model.controller), start.kl_weight)


class Trainer:
    """One fit: the model, the objective, the optimiser and the schedule, moved a step at a time.

    `build_model` and `build_objective` are there for studies that compare: contenders differ in
    these two alone.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        device: torch.device,
        build_model: Callable[[Config], RoutedLanguageModel] = RoutedLanguageModel.from_config,
        build_objective: Callable[
            [RoutedLanguageModel, ScheduleState, Tensor], Objective
        ] = svi_objective,
        world: World | None = None,
    ):
        self.config, self.data, self.device, self.world = config, data, device, world or World()
        parts = self.world.size * config.train.accumulate
        require(
            config.train.batch_size % parts == 0,
            "train.batch_size",
            f"a multiple of processes x train.accumulate = {parts}",
            config.train.batch_size,
            "it counts the rows of all processes together",
        )
        with ONE_AT_A_TIME:
            torch.manual_seed(config.train.seed)
            self.model = build_model(config).to(device)
        self.prior = build_prior(
            config.prior, config.model, config.model.num_layers, config.data.context
        )
        self.schedule = Schedule(
            config.schedule,
            self.prior,
            config.train.steps,
            config.model.experts,
            config.prior.price,
        )
        start = self.schedule.at(0)
        self.model.controller.start_at(start.concentration.to(device))
        self.objective = build_objective(self.model, start, self.prior.charged.to(device))
        assert isinstance(self.objective, nn.Module)
        if config.train.shard:
            shard(self.objective, self.model.network.blocks, device, self.world.size)
            self.replica: Callable[..., tuple[Tensor, LossTerms]] = self.objective
        else:
            self.replica = self.world.replicate(self.objective, device)
        self.optimiser = build_optimiser(self.model, config.train)
        self.guard = StepGuard(self.model, config.train.max_skipped)
        self.execution = Execution(self.model.network, config.train.compile, config.train.recompute)
        self.graphed = self._graphed() if wants_graph(config, device, self.world.size) else None

    def step(self, step: int) -> tuple[LossTerms, dict[str, float]]:
        """One update; the terms of the loss on this rank and what else a log wants.

        Raises:
            TrainingDiverged: loss or gradient were not finite too often in a row.
        """
        config, state = self.config.train, self.schedule.at(step)
        self.objective.follow(state)
        lr = set_learning_rate(self.optimiser, config, step)
        tokens, targets = self._batch(step)
        if self.graphed is not None:
            form = (state.price > 0, state.straight_through)
            with ONE_AT_A_TIME:
                loss, terms, norm = self.graphed(
                    tokens, targets, draw_seed(config.seed, step), form
                )
        else:
            self.optimiser.zero_grad(set_to_none=True)
            loss, terms = self._gradient(step, tokens, targets)
            norm = clip_gradient(self.model, config.clip)
        self.guard.step(self.optimiser, self.world.all(torch.isfinite(loss) & torch.isfinite(norm)))
        if self.device.type == "cpu" or step % CHECK_EVERY == 0 or step == config.steps - 1:
            self.guard.check(step, loss, norm, tokens)
        return terms, {"lr": lr, "kl_weight": state.kl_weight, "price": state.price}

    def whole(self) -> RoutedLanguageModel:
        """The model, or a copy that is not cut over ranks; all ranks ask together."""
        return whole_model(self.model)

    @torch.no_grad()
    def sound(self, step: int) -> bool:
        """Whether the weights are numbers, and their loss at `step`.

        A resumed run would take that step first.

        The draws are those of the step; what the next step does is not changed by it.
        """
        if not all_finite(self.model):
            return False
        self.objective.follow(self.schedule.at(step))
        tokens, targets = self._batch(step)
        parts, world = self.config.train.accumulate, self.world
        losses = []
        for part in range(parts):
            with ONE_AT_A_TIME, self._autocast(), self._draws(step, part * world.size + world.rank):
                losses.append(self.objective(tokens[part::parts], targets[part::parts])[0])
        return bool(torch.isfinite(torch.stack(losses)).all())

    def _batch(self, step: int) -> Batch:
        """This rank's rows of a step, on its device."""
        config, world = self.config, self.world
        batch = self.data.train.batch(
            step,
            config.train.batch_size,
            config.data.context,
            config.train.seed,
            world.rank,
            world.size,
        )
        return Batch(*map(self._to_device, batch))

    def _gradient(self, step: int, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms]:
        """Add up the gradient over the parts of this rank's rows.

        Loss and terms are means over the parts.
        """
        parts, world = self.config.train.accumulate, self.world
        losses, terms = [], []
        for part in range(parts):
            # holds the rows shard, shard + shards, ... of the whole batch
            shard = part * world.size + world.rank
            gather_gradients(self.replica, part == parts - 1)
            with world.averaging(self.replica, now=part == parts - 1):
                with ONE_AT_A_TIME, self.execution, self._autocast(), self._draws(step, shard):
                    loss, of_part = self.replica(tokens[part::parts], targets[part::parts])
                (loss / parts).backward()
            losses.append(loss.detach())
            terms.append(of_part)
        return torch.stack(losses).mean(), LossTerms(
            *(torch.stack(term).mean() for term in zip(*terms, strict=True))
        )

    def _graphed(self) -> GraphedGradient:
        """The step in a CUDA graph."""
        config = self.config.train

        def gradient(tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms, Tensor]:
            with self.execution, self._autocast():
                loss, terms = self.replica(tokens, targets)
            loss.backward()
            return loss, terms, clip_gradient(self.model, config.clip)

        return GraphedGradient(gradient, self.model)

    def _draws(self, step: int, shard: int) -> AbstractContextManager[object]:
        """Set the generator for a part of a step."""
        config = self.config.train
        if config.draws == "batch":
            torch.manual_seed(draw_seed(config.seed, step, shard))
            return nullcontext()
        shards = self.world.size * config.accumulate
        return RowDraws(
            [draw_seed(config.seed, step, row) for row in range(shard, config.batch_size, shards)]
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16"
        )

    def _to_device(self, tokens: Tensor) -> Tensor:
        # a copy from pageable memory would wait for the device
        return (
            tokens.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tokens.to(self.device)
        )

    def evaluate(self, model: RoutedLanguageModel | None = None) -> Evaluation:
        """Read the model, or a whole copy of it, on held-out data."""
        config = self.config
        with ONE_AT_A_TIME:
            return evaluate(
                model or self.model,
                self.data.valid,
                self.prior.concentration,
                prior_tilt=self.prior.tilt,
                context=config.data.context,
                batch_size=config.train.batch_size,
                limit=max(config.data.eval_tokens, config.data.context),
            )

    def fit_evidence(self, model: RoutedLanguageModel | None = None) -> Evidence:
        """One pass over some of the text after the last step; see `training.evidence`."""
        train, context = self.config.train, self.config.data.context
        batches = training_batches(
            self.data.train, train.steps, train.batch_size, context, train.seed
        )
        tokens = min(FIT_TOKENS, train.steps * train.batch_size * context)
        prior_total = self.prior.totals.flatten(1).mean(1)  # of a layer's units
        return fit_evidence(model or self.model, batches, prior_total, tokens=tokens)


def draw_seed(seed: int, step: int, stream: int = 0) -> int:
    """Another seed for every step, and in it for every part or row."""
    return ((seed * 1_000_003 + step) * 2_654_435_761 + stream * 0x9E37_79B9_7F4A_7C15) % 2**63


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def untrained(config: ModelConfig, seed: int = 0) -> RoutedLanguageModel:
    """A model at its initial weights, the generator of the caller left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RoutedLanguageModel(config)
