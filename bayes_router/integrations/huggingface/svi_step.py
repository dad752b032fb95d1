"""One step of SVI on what a patch added: its loss, its gradient, and what its draws cost.

Run as it stands, or replayed from a CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.inference.elbo import NegativeELBO
from bayes_router.inference.guide import Controller, RoutingGuide
from bayes_router.inference.likelihood import Likelihood, NextToken, Teacher
from bayes_router.inference.model import RoutingModel
from bayes_router.integrations.huggingface.fit_settings import FitSettings
from bayes_router.integrations.huggingface.graphs import without_mask
from bayes_router.integrations.huggingface.language import Network, RoutedLanguage
from bayes_router.integrations.huggingface.pressure import Asked, Dialled
from bayes_router.routing.cost import CostBy
from bayes_router.routing.schedule import ScheduleState
from bayes_router.training.graph import GraphedGradient
from bayes_router.training.optimise import clip_gradient
from bayes_router.transformer.nll import token_kl
from bayes_router.types import IGNORED, LossTerms, Route


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
    costs = router.prior.of_layers().to(device)
    model = RoutingModel(chosen, start.concentration, costs, start.price, likelihood=likelihood)
    model.straight_through = start.straight_through
    return model, RoutingGuide(model, router.controller if controller is None else controller)


class Counting(Network):
    """The network of a patched model that notes what each layer's weights cost.

    The costs are [L, E], the notes go to `spent`; `sharing` units pay together, the most that one
    of them costs, as in `token_cost`.
    """

    def __init__(self, router: RoutedLanguage, cost: Tensor, spent: list[Tensor], sharing: int = 1):
        super().__init__(router)
        self.cost, self.spent, self.sharing = cost, spent, sharing

    def __call__(self, tokens: Tensor, route: Route) -> Tensor:
        """See the class."""

        def counted(layer: int, hidden: Tensor) -> Tensor | int:
            weights = route(layer, hidden)
            assert isinstance(weights, Tensor)
            paid = (weights.detach() * self.cost[layer].to(weights)).sum(-1)
            if self.sharing > 1:
                paid = paid.unflatten(-1, (-1, self.sharing)).amax(-1)
            self.spent.append(paid.mean())
            return weights

        return super().__call__(tokens, counted)


class SviStep:
    """Loss and gradient of one step under the prior and the dial that it is told.

    Args:
        router: the patched model.
        settings: of the fit.
        start: the objective before the first step.
    """

    def __init__(self, router: RoutedLanguage, settings: FitSettings, start: ScheduleState):
        self.router, self.settings = router, settings
        cost, self.spent = router.layer_cost.to(router.device), list[Tensor]()
        self.teacher, self.dialled = Teacher(), Dialled(router.controller, cost)
        self.teacher.text = settings.text
        in_bytes = settings.by == CostBy.BYTES.value
        self.paid = router.layer_reads.to(router.device) if in_bytes else cost
        sharing = max(router.config.num_units // router.config.kv_heads, 1) if in_bytes else 1
        network = Counting(router, self.paid, self.spent, sharing)
        self.objective = NegativeELBO(*program(router, start, network, self.teacher, self.dialled))
        self.objective.model.through = settings.gradient_of
        self.trained = nn.ModuleList([router, *([router.model] if settings.weights_lr else [])])
        self.read = torch.zeros(2, device=router.device)  # executed cost, divergence
        if settings.graph:
            require(
                router.device.type == "cuda" and not settings.weights_lr,
                "graph",
                "False, but for a model on a CUDA device whose own weights stay",
                f"{router.device.type}, weights_lr {settings.weights_lr}",
            )
        self.graphed = GraphedGradient(self._gradient, self.trained) if settings.graph else None

    def __call__(
        self, tokens: Tensor, targets: Tensor, state: ScheduleState, asked: Asked, seed: int
    ) -> dict[str, float]:
        """The terms of the loss, and the executed cost; the gradient is left in the parameters.

        `seed` is that of the draws of a graph; without one they are torch's next.

        Raises:
            ValueError: a loss that is infinite or no number.
        """
        self.objective.follow(state)
        self.dialled.dial = asked.dial
        if self.graphed is not None:
            form = (state.price > 0, state.straight_through, asked.dial != 0)
            with without_mask(self.router.model):
                loss, terms, _ = self.graphed(tokens, targets, seed, form)
        else:
            for parameter in self.trained.parameters():
                parameter.grad = None
            loss, terms, _ = self._gradient(tokens, targets)
        row = {name: float(value) for name, value in terms._asdict().items()}
        found = float(loss)
        require(torch.isfinite(loss).item() is True, "loss", "finite", found, "lower the rates")
        cost, divergence = self.read.tolist()
        if self.settings.teacher:
            row["divergence"] = divergence
        return row | {"cost": cost, "price": state.price, "dial": asked.dial}

    def _gradient(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms, Tensor]:
        """(loss, its terms, gradient norm); nothing in here waits for the device."""
        self.spent.clear()
        if self.settings.teacher:
            self.teacher.logits = self.router.unrouted(tokens)
        loss, terms = self.objective(tokens, targets)
        if self.teacher.logits is not None and self.teacher.student is not None:
            apart = token_kl(self.teacher.logits, self.teacher.student.view_as(self.teacher.logits))
            scored = apart.masked_fill(targets == IGNORED, 0.0)
            self.read[1].copy_(scored.sum() / targets.numel())
        loss.backward()
        norm = clip_gradient(self.trained, self.settings.clip)
        self.read[0].copy_(torch.stack(self.spent).mean())
        self.spent.clear()
        self.teacher.logits = self.teacher.student = None
        return loss.detach(), terms, norm
