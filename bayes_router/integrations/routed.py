"""A patched model: controllers and experts beside a model made elsewhere, and how its tokens are routed.

What is added lives here and not in the model: its parameters, state dict and `save_pretrained` stay its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_router.attention.expert import ExpertShape
from bayes_router.config import ModelConfig, PriorConfig, require
from bayes_router.integrations.call import AttentionCall
from bayes_router.integrations.layer import EXPERTS, RoutedLayer
from bayes_router.integrations.memory import Memories
from bayes_router.integrations.texts import TokenStream
from bayes_router.routing.controller import MetaController
from bayes_router.routing.policy import Argmax, Policy, execute
from bayes_router.routing.posterior import dirichlet_kl
from bayes_router.transformer.layer import RoutingStatistics, build_prior, routing_statistics
from bayes_router.transformer.model import Force, forced_route
from bayes_router.types import Route, RoutingMode, unknown

START_SHARE = 0.9
BINDING = "_bayes_router"


@dataclass(frozen=True)
class PatchSettings:
    """What `patch` was asked for.

    Attributes:
        window: keys that `local` sees, the token itself included.
        experts: names, in the order of the routing latent; `full` is always among them.
        layers: indices of the attention layers to route, in the order in which the model runs them; None: all.
        sinks: first tokens that `local` sees beside its window.
        prior: the compute-aware prior of `fit`.
        context: tokens at which FLOPs and latency are compared, where the prior's cost asks for them.
        controller_hidden: hidden width of each layer's controller; 0 for a linear one.
        concentration_floor: least concentration of the posterior.
    """

    window: int = 256
    experts: tuple[str, ...] = ("full", "linear", "local")
    layers: tuple[int, ...] | None = None
    sinks: int = 0
    prior: PriorConfig = field(default_factory=lambda: PriorConfig(price=2.0))
    context: int = 1024
    controller_hidden: int = 64
    concentration_floor: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.window >= 1, "window", "at least 1 (a token sees itself)", self.window)
        require(self.sinks >= 0, "sinks", "0 or more tokens", self.sinks)
        require(self.context >= 1, "context", "at least 1 token", self.context)
        require("full" in self.experts, "experts", "'full' among them (the model's own attention)", self.experts)
        for name in self.experts:
            if name not in EXPERTS:
                raise unknown("experts", name, EXPERTS)
        require(len(set(self.experts)) == len(self.experts), "experts", "no name twice", self.experts)
        require(self.layers is None or len(self.layers) > 0, "layers", "at least one index, or None for all", self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FitRecord:
    """How a patch was fitted, as its folder remembers it: what its Pyro program and its diagnostics need to know.

    Attributes:
        context: tokens of a sequence.
        tokens: of text that was read for fitting.
        kl_weight: of the objective at the end.
        price: of the prior's tilt at the end, nats per unit of cost.
        straight_through: whether draws were executed as their argmax at the end.
        likelihood: model or text, see `FitSettings`.
        budget: cost at which the fit was held; None: at the prior's own price.
        tokenizer: the name of the one that made the tokens; None where ids were given.
    """

    context: int
    tokens: int
    kl_weight: float
    price: float
    straight_through: bool
    likelihood: str
    budget: float | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Found:
    """One attention layer of a model: the module that runs it, and its sizes."""

    module: nn.Module
    name: str
    shape: ExpertShape
    kv_heads: int
    width: int  # of the hidden state
    causal: bool


class Binding:
    """What a patched module holds: its router, its index there, and the hidden state of the call under way."""

    def __init__(self, router: "RoutedModel", index: int):
        self.router, self.index = router, index
        self.hidden: Tensor | None = None
        self.past: tuple[Any, Tensor | None] | None = None  # the KV cache, and what it held of this layer's keys

    def attend(self, call: AttentionCall) -> Tensor:
        """Route the call's queries and execute it: [B, H, Tq, Dv]."""
        assert self.hidden is not None
        hidden, self.hidden = self.hidden, None
        past, self.past = self.past, None
        if past is not None:
            memory = self.router.memories.of(past[0], self.index)
            memory.follow(past[1], call)
            call = replace(call, memory=memory)
        return self.router.attend(self.index, hidden, call)


class RoutedModel(nn.Module):
    """A model whose attention layers route their tokens; what `patch` returns.

    Its own state holds what was added and nothing else. Unfitted, every token takes `full`: the model is unchanged.
    Evaluation mode executes the policy's choice (HARD), training mode draws (SAMPLE); `mode` overrides.

    Attributes:
        model: the patched model itself, to be used as before.
        settings: what it was patched with.
        policy: of HARD.
        mode: overrides what train and eval mode imply.
        fitted: how it was fitted; None before.
        held_out: text that `fit` did not read.
    """

    fitted: FitRecord | None = None
    held_out: TokenStream | None = None

    def __init__(self, model: nn.Module, found: list[Found], settings: PatchSettings):
        super().__init__()
        self._base = (model,)  # in a tuple: not a submodule
        self.settings, self.found = settings, tuple(found)
        shapes = [one.shape._replace(window=settings.window) for one in found]
        self.config = model_config(found[0], settings, len(found))
        self.prior = build_prior(settings.prior, self.config, len(found), settings.context)
        self.cost_ratio = self.prior.cost_ratio
        self.controller = MetaController(
            found[0].width, len(found), len(settings.experts), settings.controller_hidden, settings.concentration_floor
        )
        self.layers = nn.ModuleList(
            RoutedLayer(settings.experts, shape, one.kv_heads, settings.sinks, one.causal)
            for one, shape in zip(found, shapes, strict=True)
        )
        self.policy: Policy = Argmax()
        self.mode: RoutingMode | None = None
        self._force: Force | None = None
        self._route: Route | None = None
        self._observe: Callable[[int, AttentionCall, Tensor], None] | None = None
        self._concentration: dict[int, Tensor] = {}
        self._executed: dict[int, Tensor] = {}
        self._restore: list[Callable[[], None]] = []
        self.memories = Memories()
        self._start_on_full()

    def _start_on_full(self) -> None:
        share = torch.full((len(self.settings.experts),), (1 - START_SHARE) / max(len(self.settings.experts) - 1, 1))
        share[self.experts.index("full")] = START_SHARE
        total = torch.tensor(self.prior.total_concentration)[:, None]
        self.controller.start_at((share * total).clamp_min(2 * self.controller.floor))
        reference = next(self.model.parameters())
        self.to(reference.device)
        self.requires_grad_(any(p.requires_grad for p in self.model.parameters()))

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self._base[0]

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in the order of the routing latent."""
        return self.settings.experts

    @property
    def training(self) -> bool:
        """The model's own mode."""
        return self._base[0].training if "_base" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # the model's mode is the only one

    def train(self, mode: bool = True) -> "RoutedModel":
        """Set the mode of the model."""
        self.model.train(mode)
        return self

    def force(self, force: Force | None) -> None:
        """Send every token to one expert (its name), or where choices [L, B, T] or weights say; None: route again."""
        if force is not None:
            forced_route(force, self.experts, len(self.layers))
        self._force = force

    def attend(self, index: int, hidden: Tensor, call: AttentionCall) -> Tensor:
        """What a patched layer calls: hidden [B, Tq, D], the call after the KV cache -> [B, H, Tq, Dv]."""
        return self.execute(index, self.route(index, hidden), call, hidden)

    def route(self, index: int, hidden: Tensor) -> Tensor | int:
        """Where the tokens of a layer go: weights [B, T, E], choices int64 [B, T], or one expert for all."""
        if self._observe is not None:
            return self.experts.index("full")
        if self._route is None and self._force is not None:
            return forced_route(self._force, self.experts, len(self.layers))(index, hidden)
        self.controller.layers[index].to(hidden.device)  # the model may have been moved
        hidden = normalised(hidden)
        if self._route is not None:
            return self._route(index, hidden)
        q = self.controller.posterior(index, hidden)
        mode = self.mode or (RoutingMode.SAMPLE if self.training else RoutingMode.HARD)
        executed = execute(q, mode, self.policy)
        self._concentration[index], self._executed[index] = q.concentration, executed
        return executed

    def execute(self, index: int, route: Tensor | int, call: AttentionCall, hidden: Tensor) -> Tensor:
        """The output [B, H, Tq, Dv] of a layer's call under a route."""
        layer = self.layers[index]
        assert isinstance(layer, RoutedLayer)
        if self._observe is not None:
            self._observe(index, call, hidden)
        layer.to(call.q.device)
        return layer.attend(call, route)

    @contextmanager
    def routed_by(self, route: Route) -> Iterator[None]:
        """Let `route(layer, hidden)` answer for every layer: a Pyro model, a recorder, a constant."""
        before, self._route = self._route, route
        try:
            yield
        finally:
            self._route = before

    @contextmanager
    def observed_by(self, observe: Callable[[int, AttentionCall, Tensor], None]) -> Iterator[None]:
        """Run on full attention and show every call to `observe(layer, call, hidden)`."""
        self._observe = observe
        try:
            yield
        finally:
            self._observe = None

    def kl(self) -> Tensor:
        """KL(posterior || prior) of the last pass, nats per token, summed over layers: task loss + weight * kl is an ELBO.

        Raises:
            ValueError: nothing was routed since the patch, or all of it was forced.
        """
        prior = self.prior.concentration
        q = self._last()
        return torch.stack([dirichlet_kl(q[i], prior[i].to(q[i].device)).mean() for i in range(len(q))]).sum()

    def statistics(self) -> list[RoutingStatistics]:
        """How each layer routed the last pass."""
        return [
            routing_statistics(
                concentration.detach(), self._executed[i].detach(), self.cost_ratio.to(concentration.device), self.experts
            )
            for i, concentration in enumerate(self._last())
        ]

    def _last(self) -> list[Tensor]:
        require(
            len(self._concentration) == len(self.layers),
            "last pass",
            f"posteriors of {len(self.layers)} layers",
            len(self._concentration),
            "run the model once, not forced",
        )
        return [self._concentration[i] for i in range(len(self.layers))]

    def unpatch(self) -> nn.Module:
        """Take everything off the model again and return it; its outputs are then exactly what they were."""
        while self._restore:
            self._restore.pop()()
        return self.model

    @property
    def patched(self) -> bool:
        """Whether the model still routes."""
        return bool(self._restore)

    def save(self, folder: Any, held_out: bool = True) -> None:
        """Write what was added, see `load_patch`; with `held_out` also up to 32,768 tokens of text that `fit` did not read.

        `bayes-router inspect` and `report` show that text; without it they ask for one.
        """
        from bayes_router.integrations.saving import save_router

        save_router(self, folder, held_out)

    def _bind(self) -> None:
        """Give every found module its binding."""
        for index, one in enumerate(self.found):
            setattr(one.module, BINDING, Binding(self, index))
            self._restore.append(partial(delattr, one.module, BINDING))  # a partial is copied with the model, a closure not


def normalised(hidden: Tensor) -> Tensor:
    """Scaled to unit root mean square, float32: what a controller reads, on one scale in every layer of every model."""
    return F.rms_norm(hidden.float(), hidden.shape[-1:])


def model_config(found: Found, settings: PatchSettings, num_layers: int, vocab_size: int = 1) -> ModelConfig:
    """The routed layers in the terms of the project: what costs, diagnostics and reports read."""
    heads, dim = found.shape.num_heads, found.shape.head_dim
    require(dim % 2 == 0, "head_dim", "an even number", dim, "models with odd heads are not served")
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=heads * dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=found.kv_heads,
        experts=settings.experts,
        window=settings.window + settings.sinks,  # what `local` reads, hence what it costs
        controller_hidden=settings.controller_hidden,
        concentration_floor=settings.concentration_floor,
    )
