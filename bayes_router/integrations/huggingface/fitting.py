"""Fitting what a patch added.

First distillation of feature maps, then SVI on the ELBO, all by the project's own program.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.config import ScheduleConfig
from bayes_router.data.tokens import TokenSource, step_rng
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.precision import uncached
from bayes_router.integrations.huggingface.fit_settings import FitSettings
from bayes_router.integrations.huggingface.language import RoutedLanguage
from bayes_router.integrations.huggingface.pressure import Asked, BudgetRange, pressure_for
from bayes_router.integrations.huggingface.svi_step import SviStep
from bayes_router.integrations.patch.distil import distillation_errors
from bayes_router.progress import Progress
from bayes_router.routing.schedule import Schedule
from bayes_router.training.optimise import set_learning_rate

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def fitting(router: RoutedLanguage, weights: bool) -> Iterator[None]:
    """Gradients for what is fitted alone, dropout only where the model's own weights are.

    All flags restored.

    Under autocast, which may be the caller's, cast weights are not kept from step to step.
    """
    model = router.model
    modes = [(module, module.training) for module in model.modules()]
    require(
        not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "model",
        "no gradient checkpointing: recomputing a layer would draw its routes again",
        True,
        "call model.gradient_checkpointing_disable() first",
    )
    model.train(weights)
    try:
        with router.only_this(weights), uncached(router.device):
            yield
    finally:
        for p in (*router.parameters(), *model.parameters()):
            p.grad = None
        for module, mode in modes:
            module.training = mode


def distil(
    router: RoutedLanguage, source: TokenSource, settings: FitSettings, progress: bool = False
) -> list[float]:
    """Teach every linear expert its own layer's full attention.

    The mean relative squared error of each step.

    For layer l and expert e: mean |e(q, k, v) - full(q, k, v)|^2 / mean |full(q, k, v)|^2, on the
    calls of the unchanged model. No gradient enters the model.
    """
    parameters = [p for layer in router.layers for p in layer.parameters()]
    if not parameters or not settings.distil_steps:
        return []
    optimiser = torch.optim.AdamW([{"params": parameters, "peak": settings.lr}], weight_decay=0.0)
    device, losses = router.device, []
    for step in Progress("distil", settings.distil_steps, shown=progress).over(
        range(settings.distil_steps)
    ):
        set_learning_rate(optimiser, settings.distil_rates(), step)
        tokens = source.batch(
            step, settings.batch_size, min(settings.contexts), settings.seed + 7
        ).tokens.to(device)
        errors: list[Tensor] = []

        def compare(
            index: int, call: AttentionCall, hidden: Tensor, errors: list[Tensor] = errors
        ) -> None:
            found = distillation_errors(router.layers[index], call)
            for error in found:
                error.backward()  # at once: only one layer's graph is ever held
            errors.extend(error.detach() for error in found)

        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad(), router.observed_by(compare):
            router.logits(tokens)
        nn.utils.clip_grad_norm_(parameters, settings.clip * len(errors))
        optimiser.step()
        losses.append(float(torch.stack(errors).mean()))
    return losses


def fit_routes(
    router: RoutedLanguage,
    source: TokenSource,
    settings: FitSettings,
    schedule_config: ScheduleConfig,
    progress: bool = False,
) -> "pd.DataFrame":
    """SVI: one row a step, with the loss terms in nats per token, the executed cost and the price.

    Raises:
        ValueError: the loss became infinite or no number.
    """
    import pandas as pd

    device, most = router.device, max(settings.steps, 1)
    price = router.settings.prior.price
    schedule = Schedule(schedule_config, router.prior, most, router.experts, price)
    one = SviStep(router, settings, schedule.at(0))
    pressure = pressure_for(settings.budget, one.paid, price)
    if isinstance(pressure, BudgetRange) and router.fitted is None:
        _start_in_the_middle(router)
    # gradients are of the order of a unit's share in the loss, far below what Adam's usual epsilon
    # stands for
    optimiser = torch.optim.AdamW(
        _groups(router, settings), weight_decay=0.0, betas=(0.9, 0.98), eps=1e-12
    )
    rows, started = [], time.perf_counter()
    bar = Progress("fit", settings.steps, shown=progress)
    for step in bar.over(range(settings.steps)):
        late = (time.perf_counter() - started) / settings.seconds
        if late >= 1:
            break
        done = max(step / settings.steps, late)  # the schedules follow whichever limit is nearer
        state, random = schedule.at(int(done * settings.steps)), step_rng(settings.seed + 13, step)
        asked = Asked(state.price) if pressure is None else pressure.ask(done, random)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * settings.rate(step, done)
        batch = source.batch(step, *settings.shape(random), settings.seed)
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        seed = int(random.integers(2**31))
        row = one(tokens, targets, replace(state, price=asked.price), asked, seed)
        optimiser.step()
        if pressure is not None:
            pressure.see(row["cost"])
        rows.append({"step": step + 1, **row, "context": tokens.shape[1]})
        bar.say(f"nll {row['nll']:.3f} cost {row['cost']:.3f}")
    return pd.DataFrame(rows)


def _start_in_the_middle(router: RoutedLanguage) -> None:
    """Posteriors of `BudgetRange.MIDDLE` on full.

    A dial at 0 then spends what it stands for, before anything is learned.
    """
    mean = torch.full(
        (len(router.experts),), (1 - BudgetRange.MIDDLE) / max(len(router.experts) - 1, 1)
    )
    mean[router.experts.index("full")] = BudgetRange.MIDDLE
    total = router.prior.totals
    router.controller.start_at((mean * total).clamp_min(2 * router.controller.floor))


def _groups(router: RoutedLanguage, settings: FitSettings) -> list[dict[str, Any]]:
    """Parameters with their peak learning rates.

    Controllers, experts, and the model's own where they move.
    """
    named = list(router.controller.named_parameters())
    biases = [p for name, p in named if name.endswith("out.bias")]
    rest = [p for name, p in named if not name.endswith("out.bias")]
    groups: list[dict[str, Any]] = [
        {"params": rest, "peak": settings.controller_lr},
        {"params": biases, "peak": settings.bias_lr or settings.controller_lr},
    ]
    own = [p for layer in router.layers for p in layer.parameters()]
    if own:
        groups.append({"params": own, "peak": settings.lr})
    if settings.weights_lr:
        groups.append({"params": list(router.model.parameters()), "peak": settings.weights_lr})
    return groups
