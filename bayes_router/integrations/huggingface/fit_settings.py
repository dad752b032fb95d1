"""How a patch is fitted, and what it remembers of that."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bayes_router.checks import check_kinds, choose, require
from bayes_router.config import ScheduleConfig, TrainConfig
from bayes_router.inference.likelihood import Observed
from bayes_router.inference.model import Through
from bayes_router.integrations.huggingface.language import RoutedLanguage
from bayes_router.integrations.patch.settings import FitRecord
from bayes_router.routing.cost import CostBy
from bayes_router.routing.schedule import Schedule, ScheduleState

if TYPE_CHECKING:
    import pandas as pd

KL_WEIGHT = 0.02  # of the mean over layers and units of the KL
TEXT_SHARE = 0.1  # of what a fit of a range of budgets observes


@dataclass(frozen=True)
class FitSettings:
    """How a patch is fitted.

    Attributes:
        steps: of SVI.
        distil_steps: of distillation before it; skipped where no expert has parameters.
        context: tokens of a sequence; or several lengths, one of which is drawn each step.
        batch_size: sequences a step; of lengths below the longest so many that a step has as many
            tokens.
        lr: peak learning rate of the experts' own parameters.
        controller_lr: peak learning rate of the controllers.
        bias_lr: of the bias of their last layer, which moves a unit's posterior for all tokens at
            once; None: `controller_lr`.
        weights_lr: of the model's own weights; 0 leaves them as they are.
        warmup: steps of linear warm-up.
        decay: share of SVI, its last, in which rates fall linearly to 0. Before they are constant:
            controllers learn most once the cost has come down (`analysis/PRETRAINED.md`).
        through: draw or mean, of a posterior, whose gradient stands for that of the choice that is
            executed, see `RoutingModel`. None: mean for a range of budgets
            (`analysis/PRETRAINED.md`), else draw.
        graph: replay steps from a CUDA graph, one for each length: a model on a CUDA device whose
            layers see all keys before them.
        clip: largest gradient norm.
        likelihood: model, the next tokens of the unpatched model in expectation (self-distillation:
            the patch stays as near to it as it can); text, those of the text, which routes may then
            tell better than the unpatched model does (`analysis/PRETRAINED.md`); both, half of
            each; or a number from 0 to 1, the text's share. None: a tenth of the text for a range
            of budgets, which keeps perplexity at the unpatched model's or below, at hardly more
            divergence from it (`analysis/PRETRAINED.md`); else model; but text where the model's
            own weights move.
        budget: cost at which executed draws are held by moving the price, full = 1; or (low, high),
            a budget drawn anew each step, so that one fit serves them all, see `BudgetRange`; None:
            the prior's own price.
        by: what the budget is over: flops, that every query head pays for its own expert; or bytes,
            the keys and values that a decoding step reads, see `CostBy`. The price stays one of the
            prior's costs, and moves until what is held is met.
        seconds: the fit ends after about so many, its schedules shortened to that.
        seed: of batches and posterior draws.
    """

    steps: int = 200
    distil_steps: int = 100
    context: int | tuple[int, ...] = 512
    batch_size: int = 4
    lr: float = 1e-3
    controller_lr: float = 3e-3
    bias_lr: float | None = None
    weights_lr: float = 0.0
    warmup: int = 10
    decay: float = 0.25
    through: str | None = None
    graph: bool = False
    clip: float = 1.0
    likelihood: str | float | None = None
    budget: float | tuple[float, float] | None = None
    by: str = CostBy.FLOPS.value
    seconds: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        check_kinds(self)
        if isinstance(self.likelihood, str):
            choose("likelihood", self.likelihood, Observed)
        elif self.likelihood is not None:
            share = "a name, or a share of the text from 0 to 1"
            require(0 <= self.likelihood <= 1, "likelihood", share, self.likelihood)
        budgets = [] if self.budget is None else np.atleast_1d(self.budget).tolist()
        ranged = isinstance(self.budget, tuple | list)
        ordered = budgets == sorted(set(budgets)) and len(budgets) in ({2} if ranged else {0, 1})
        fits = ordered and all(0 < b <= 1 for b in budgets)
        require(fits, "budget", "a cost in (0, 1], full = 1, or (low, high), or None", self.budget)
        if budgets:  # as a folder remembers it
            object.__setattr__(self, "budget", tuple(budgets) if ranged else budgets[0])
        require(len(self.contexts) > 0, "context", "a length or several", self.context)
        require(all(c >= 1 for c in self.contexts), "context", "at least 1", self.context)
        for name in ("steps", "distil_steps", "weights_lr", "warmup", "seed"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        require(0 < self.decay <= 1, "decay", "a share of the fit, in (0, 1]", self.decay)
        choose("by", self.by, CostBy)
        if self.through is not None:
            choose("through", self.through, Through)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        for name in ("lr", "controller_lr", "bias_lr", "clip", "seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "a positive number", value)

    @property
    def contexts(self) -> tuple[int, ...]:
        """The lengths that are drawn from."""
        return (self.context,) if isinstance(self.context, int) else tuple(self.context)

    def shape(self, random: np.random.Generator) -> tuple[int, int]:
        """(sequences, tokens of each) of a step."""
        context = self.contexts[int(random.integers(len(self.contexts)))]
        return max(1, self.batch_size * max(self.contexts) // context), context

    @property
    def teacher(self) -> bool:
        """Whether the unpatched model is, or is part of, what the fit follows."""
        return self.text < 1

    @property
    def observed(self) -> str | float:
        """`likelihood`, chosen."""
        if self.likelihood is not None:
            return self.likelihood
        if self.weights_lr > 0:
            return Observed.TEXT.value
        return TEXT_SHARE if isinstance(self.budget, tuple) else Observed.MODEL.value

    @property
    def text(self) -> float:
        """The share of the text's own tokens in what is observed."""
        chosen = self.observed
        return Observed(chosen).text if isinstance(chosen, str) else float(chosen)

    def distil_rates(self) -> TrainConfig:
        """Of distillation, as the shared learning-rate schedule takes it."""
        steps = self.distil_steps
        return TrainConfig(steps=max(steps, 1), warmup=min(self.warmup, steps), lr=self.lr)

    @property
    def gradient_of(self) -> str:
        """`through`, chosen."""
        by_default = Through.MEAN if isinstance(self.budget, tuple) else Through.DRAW
        return by_default.value if self.through is None else self.through

    def rate(self, step: int, done: float) -> float:
        """Of SVI, over the peak, at a step before which `done` of the fit lies."""
        warm = min((step + 1) / max(min(self.warmup, self.steps), 1), 1.0)
        return warm * min((1 - done) / self.decay, 1.0)


def final_state(router: RoutedLanguage, schedule: ScheduleConfig | None = None) -> ScheduleState:
    """The objective at the end of a fit."""
    chosen = schedule or default_schedule(len(router.layers) * router.config.num_units)
    chosen.check_experts(router.experts, router.config.num_units)
    return Schedule(chosen, router.prior, 1, router.experts, router.settings.prior.price).at(1)


def objective_at_end(
    router: RoutedLanguage, schedule: ScheduleConfig | None = None
) -> ScheduleState:
    """The objective at the end of the fit that was, or of one by `schedule`."""
    fitted = router.fitted
    if schedule is not None or fitted is None:
        return final_state(router, schedule)
    return ScheduleState(
        fitted.kl_weight, router.prior.concentration, fitted.price, fitted.straight_through
    )


def record(
    router: RoutedLanguage,
    settings: FitSettings,
    schedule: ScheduleConfig,
    frame: "pd.DataFrame",
    tokens: int,
    tokenizer: str | None,
) -> FitRecord:
    """What a patch remembers of its fit."""
    end = final_state(router, schedule)
    price = (
        float(frame["price"].iloc[-1]) if len(frame) and settings.budget is not None else end.price
    )
    return FitRecord(
        max(settings.contexts),
        tokens,
        end.kl_weight,
        price,
        end.straight_through,
        settings.observed,
        settings.budget,
        str(tokenizer) if tokenizer else None,
        read=last_read(frame),
        by=settings.by,
    )


def last_read(frame: "pd.DataFrame") -> dict[str, float]:
    """Means of the last tenth of the steps, at least five, and their standard errors over steps."""
    last = frame.tail(max(len(frame) // 10, 5))
    names = [name for name in ("nll", "divergence", "kl", "cost") if name in last]
    errors = {
        f"{name}_se": float(last[name].std()) / len(last) ** 0.5 for name in names if len(last) > 1
    }
    means = {name: float(last[name].mean()) for name in names} if len(last) else {}
    return means | errors | {"steps": float(len(last))} if means else {}


def default_schedule(num_latents: int, ranged: bool = False) -> ScheduleConfig:
    """Start on full attention, let the compute-aware prior in, end on executed argmax draws.

    For a range of budgets the price does all that: draws are executed from the first step, under a
    prior that stays. `num_latents` of a token, layers times units: the KL is summed over them.
    """
    if ranged:
        still = ScheduleConfig(anneal_from=0.0, anneal_to=0.0, straight_through_from=0.0)
        return replace(still, kl_weight=KL_WEIGHT / num_latents)
    return ScheduleConfig(
        kl_weight=KL_WEIGHT / num_latents,
        start_experts=("full",),
        anneal_from=0.0,
        anneal_to=0.5,
        straight_through_from=0.5,
    )
