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
from bayes_router.inference.elbo import NegativeELBO
from bayes_router.inference.guide import Controller, RoutingGuide
from bayes_router.inference.likelihood import Likelihood, NextToken, Teacher, entropy
from bayes_router.inference.model import RoutingModel
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.precision import uncached
from bayes_router.integrations.huggingface.fit_settings import FitSettings
from bayes_router.integrations.huggingface.language import Network, RoutedLanguage
from bayes_router.integrations.huggingface.pressure import BudgetRange, Dialled, pressure_for
from bayes_router.integrations.patch.distil import distillation_errors
from bayes_router.progress import Progress
from bayes_router.routing.schedule import Schedule, ScheduleState
from bayes_router.training.optimise import clip_gradient, set_learning_rate
from bayes_router.types import IGNORED, Route

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


def program(
    router: RoutedLanguage,
    start: ScheduleState,
    network: Any = None,
    likelihood: Likelihood = NextToken,
    controller: Controller | None = None,
) -> tuple[RoutingModel, RoutingGuide]:
    """The project's model and guide around a patched model.

    Routes are latent, the model's logits the likelihood.
    """
    device = router.device
    chosen = router.network if network is None else network
    costs = router.layer_cost.to(device)
    model = RoutingModel(chosen, start.concentration, costs, start.price, likelihood=likelihood)
    model.straight_through = start.straight_through
    return model, RoutingGuide(model, router.controller if controller is None else controller)


class Counting(Network):
    """The network of a patched model that notes what each layer's weights cost.

    The costs layer_cost are [L, E], the notes go to `spent`.
    """

    def __init__(self, router: RoutedLanguage, layer_cost: Tensor, spent: list[Tensor]):
        super().__init__(router)
        self.layer_cost, self.spent = layer_cost, spent

    def __call__(self, tokens: Tensor, route: Route) -> Tensor:
        """See the class."""

        def counted(layer: int, hidden: Tensor) -> Tensor | int:
            weights = route(layer, hidden)
            assert isinstance(weights, Tensor)
            self.spent.append(
                (weights.detach() * self.layer_cost[layer].to(weights)).sum(-1).mean()
            )
            return weights

        return super().__call__(tokens, counted)


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

    spent: list[Tensor] = []
    device = router.device
    cost = router.layer_cost.to(device)

    network = Counting(router, cost, spent)
    schedule = Schedule(
        schedule_config,
        router.prior,
        max(settings.steps, 1),
        router.experts,
        router.settings.prior.price,
    )
    teacher = Teacher()
    dialled = Dialled(router.controller, cost)
    objective = NegativeELBO(*program(router, schedule.at(0), network, teacher, dialled))
    pressure = pressure_for(settings.budget, router.layer_cost, router.settings.prior.price)
    if isinstance(pressure, BudgetRange) and router.fitted is None:
        _start_in_the_middle(router)
    # gradients are of the order of a unit's share in the loss, far below what Adam's usual epsilon
    # stands for
    optimiser = torch.optim.AdamW(
        _groups(router, settings), weight_decay=0.0, betas=(0.9, 0.98), eps=1e-12
    )
    trained = nn.ModuleList([router, *([router.model] if settings.weights_lr else [])])
    rows, started = [], time.perf_counter()
    bar = Progress("fit", settings.steps, shown=progress)
    for step in bar.over(range(settings.steps)):
        late = (time.perf_counter() - started) / settings.seconds
        if late >= 1:
            break
        done = max(step / settings.steps, late)  # the schedules follow whichever limit is nearer
        state, random = schedule.at(int(done * settings.steps)), step_rng(settings.seed + 13, step)
        if pressure is not None:
            asked = pressure.ask(done, random)
            state, dialled.dial = replace(state, price=asked.price), asked.dial
        objective.follow(state)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * settings.rate(step, done)
        batch = source.batch(step, *settings.shape(random), settings.seed)
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        teacher.logits = router.unrouted(tokens) if settings.teacher else None
        loss, terms = objective(tokens, targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradient(trained, settings.clip)
        optimiser.step()
        row = {"step": step + 1, **{name: float(value) for name, value in terms._asdict().items()}}
        require(
            torch.isfinite(loss).item() is True,
            f"step {step}",
            "a finite loss",
            float(loss.detach()),
            "lower the rates",
        )
        if teacher.logits is not None:
            row["divergence"] = row["nll"] - float(
                entropy(teacher.logits)[targets != IGNORED].sum() / targets.numel()
            )
        row["cost"], row["price"], row["dial"] = (
            float(torch.stack(spent).mean()),
            state.price,
            dialled.dial,
        )
        row["context"] = tokens.shape[1]
        spent.clear()
        if pressure is not None:
            pressure.see(row["cost"])
        rows.append(row)
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
    total = torch.tensor(router.prior.total_concentration)[:, None]
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
