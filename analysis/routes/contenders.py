"""The contenders of the study: configurations of one model, and two objectives besides the ELBO."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet
from torch.nn import functional as F

from analysis.routes.variants import with_controller
from bayes_router.config import Config, ModelConfig, config_from_dict
from bayes_router.routing.controller import MetaController
from bayes_router.routing.posterior import categorical_entropy
from bayes_router.routing.schedule import ScheduleState
from bayes_router.training.fit import Objective, svi_objective
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.nll import mean_nll
from bayes_router.types import LossTerms

SURE = 1e6  # total concentration of a router that has no doubt


class SoftmaxController(MetaController):
    """Route = softmax(controller(hidden)), told to the evaluation as a sure Dirichlet."""

    def posterior(self, layer: int, hidden: Tensor, units: Tensor | None = None) -> Dirichlet:
        """See `MetaController.posterior`."""
        weights = self.layers[layer](hidden).float().softmax(-1)
        return Dirichlet(SURE * weights + 1e-6, validate_args=False)


class StaticController(MetaController):
    """Every token of a layer takes the experts that `pattern` names, whatever it is."""

    def __init__(self, config: ModelConfig, pattern: tuple[str, ...]):
        size = config.num_layers, len(config.experts), 0
        super().__init__(config.d_model, *size, num_units=config.num_units)
        self.choice = list[int | None]()  # of a layer whose units have one expert
        for layer in range(config.num_layers):
            names = pattern[layer % len(pattern)].split(",")
            named = [config.experts.index(name) for name in names]
            taken = torch.tensor([named[unit % len(named)] for unit in range(config.num_units)])
            self.choice.append(named[0] if len(set(named)) == 1 else None)
            weights = F.one_hot(taken, len(config.experts)).float()  # [R, E]
            self.register_buffer(f"taken_{layer}", weights, persistent=False)
        self.requires_grad_(False)

    def taken(self, layer: int, hidden: Tensor) -> Tensor:
        """The route of every token [B, T, R, E]."""
        return self.get_buffer(f"taken_{layer}").expand(*hidden.shape[:-1], -1, -1)

    def posterior(self, layer: int, hidden: Tensor, units: Tensor | None = None) -> Dirichlet:
        """See `MetaController.posterior`."""
        return Dirichlet(SURE * self.taken(layer, hidden) + 1e-6, validate_args=False)


class SoftmaxModel(RoutedLanguageModel):
    """A router without a posterior."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        size = config.d_model, config.num_layers, len(config.experts), config.controller_hidden
        made = SoftmaxController(*size, config.concentration_floor, config.num_units)
        made.load_state_dict(self.controller.state_dict())
        self.controller = made


class StaticModel(RoutedLanguageModel):
    """Every token of a layer takes the expert that `pattern` names, whatever it is.

    A name such as `full,local` names one for each unit of the layer, in turn.
    """

    controller: StaticController

    def __init__(self, config: ModelConfig, pattern: tuple[str, ...]):
        super().__init__(config)
        self.controller = StaticController(config, pattern)


class PlainObjective(nn.Module):
    """Cross-entropy of a deterministic router, with the penalties that others add.

    Each weight may be zero.

    cost: on mean cost. entropy: on minus the token entropies (a bonus). balance: Switch's E sum_e
    f_e P_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4), f_e the share of tokens whose argmax is e
    and P_e the mean weight.
    """

    def __init__(
        self,
        model: RoutedLanguageModel,
        cost_ratio: Tensor,
        cost: float,
        entropy: float,
        balance: float,
    ):
        super().__init__()
        self.model, self.cost_ratio = model, cost_ratio
        self.cost, self.entropy, self.balance = cost, entropy, balance
        self.register_buffer("ramp", torch.ones((), device=cost_ratio.device))

    def follow(self, state: ScheduleState) -> None:
        """The penalty on cost grows as the price of the prior does."""
        self.get_buffer("ramp").fill_(state.price)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms]:
        """Loss and parts."""
        weights: list[Tensor] = []

        def route(layer: int, hidden: Tensor) -> Tensor | int:
            if isinstance(self.model, StaticModel):
                static = self.model.controller
                for_all = static.choice[layer]
                return static.taken(layer, hidden) if for_all is None else for_all
            weights.append(self.model.controller.layers[layer](hidden).float().softmax(-1))
            return weights[-1]

        logits = self.model.network(tokens, route)
        nll = mean_nll(logits, targets)
        loss = nll
        for w in weights:
            shares = F.one_hot(w.argmax(-1), w.shape[-1]).float().mean((0, 1))
            loss = (
                loss
                + self.get_buffer("ramp") * self.cost * (w @ self.cost_ratio).mean()
                - self.entropy * categorical_entropy(w).mean()
            )
            loss = loss + self.balance * w.shape[-1] * (shares * w.mean((0, 1))).sum()
        nothing = torch.zeros((), device=nll.device)
        return loss, LossTerms(nll.detach(), nothing, -nll.detach())


@dataclass(frozen=True)
class Contender:
    """A way of deciding where tokens go.

    Changes to the common configuration, and how it is trained.
    """

    kind: str = "svi"  # svi, softmax or static
    controller: str = ""  # of svi: one of `analysis.routes.variants`; empty is the library's
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    pattern: tuple[str, ...] = ()
    cost: float = 0.0
    entropy: float = 0.0
    balance: float = 0.0

    def config(self, common: Config) -> Config:
        """The common configuration with this contender's changes."""
        return config_from_dict(self.changes, common)

    def build_model(self) -> Callable[[Config], RoutedLanguageModel]:
        """Makes the model of a configuration."""
        if self.kind == "static":
            return lambda config: StaticModel(config.model, self.pattern)
        if self.controller:
            return lambda config: with_controller(config.model, self.controller)
        return (
            (lambda config: SoftmaxModel(config.model))
            if self.kind == "softmax"
            else RoutedLanguageModel.from_config
        )

    def build_objective(self) -> Callable[[RoutedLanguageModel, ScheduleState, Tensor], Objective]:
        """Makes the objective of a model."""
        if self.kind == "svi":
            return svi_objective
        return lambda model, start, cost_ratio: PlainObjective(
            model, cost_ratio, self.cost, self.entropy, self.balance
        )
