"""A patched model: controllers and experts beside a model made elsewhere, and how its tokens are routed.

What is added lives here and not in the model: its parameters, state dict and `save_pretrained` stay its own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet
from torch.nn import functional as F

from bayes_router.attention.expert import ExpertShape, widen
from bayes_router.config import ModelConfig, PriorConfig, require
from bayes_router.integrations.call import AttentionCall
from bayes_router.integrations.cost import layer_costs, layer_prior
from bayes_router.integrations.identity import fingerprint
from bayes_router.integrations.layer import EXPERTS, RoutedLayer
from bayes_router.integrations.memory import Memories
from bayes_router.integrations.texts import TokenStream
from bayes_router.routing.controller import MetaController
from bayes_router.routing.policy import Argmax, Policy, execute
from bayes_router.routing.posterior import dirichlet_kl, posterior_mean
from bayes_router.routing.tilt import tilted_moments
from bayes_router.transformer.layer import RoutingStatistics, routing_statistics
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
        context: tokens at which FLOPs and latency are compared, where the prior's cost asks for them; a layer whose own window
            is shorter pays for that window.
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
    window: int | None = None  # keys that the layer's own attention sees, where it slides


class Binding:
    """What a patched module holds: its router, its index there, and the hidden state of the call under way."""

    def __init__(self, router: "RoutedModel", index: int):
        self.router, self.index = router, index
        self.hidden: Tensor | None = None
        self.past: tuple[Any, Tensor | None] | None = None  # the KV cache, and what it held of this layer's keys
        self.crossed = False  # it was called as cross-attention

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

    def name_crossing(self) -> None:
        """Warn, once, of a call that is not routed: query and key are two tensors."""
        if not self.crossed:
            name = self.router.found[self.index].name or type(self.router.model).__name__
            warnings.warn(
                f"{name}: called as cross-attention (its query is not its key): such calls are not routed and run as before; "
                "pass one tensor as both, or leave the module out by patch(layers=...)",
                stacklevel=4,
            )
        self.crossed = True

    def require_full(self, asked: str) -> None:
        """Route the call's queries and see that `full` takes them all: the original may answer what no expert can.

        Raises:
            ValueError: some take another expert; `asked` names the argument.
        """
        assert self.hidden is not None
        hidden, self.hidden, self.past = self.hidden, None, None
        route = self.router.route(self.index, hidden)
        require(
            all_on(route, self.router.experts.index("full")),
            asked,
            "False where tokens are routed: a mixture of experts has no attention weights",
            True,
            "force('full'), or unpatch() first",
        )


class RoutedModel(nn.Module):
    """A model whose attention layers route their tokens; what `patch` returns.

    Its own state holds what was added and nothing else. Evaluation mode executes the policy's choice (HARD), training mode
    draws (SAMPLE); `mode` overrides. Unfitted, in evaluation mode, every token takes `full`: the model is unchanged.

    It follows its model, when it is called or its parameters are asked for: mode and device are the model's; so is the dtype,
    but half precision stays float32 here, which posteriors and sums over the past need; and `requires_grad` is copied whenever
    the model's changes (whether any weight is trained), so that `router.requires_grad_(True)` after
    `model.requires_grad_(False)` trains the router alone.

    Attributes:
        model: the patched model itself, to be used as before.
        settings: what it was patched with.
        cost_ratio: [E], relative to attention over all keys = 1.
        layer_cost: [L, E], the same by layer: a layer that slides already pays for its own window alone.
        policy: of HARD.
        mode: overrides what train and eval mode imply.
        fitted: how it was fitted; None before.
        held_out: text that `fit` did not read.
        made_for: fingerprint of the model as it was patched; empty once `fit` moved its own weights.
    """

    fitted: FitRecord | None = None
    held_out: TokenStream | None = None
    _trainable: bool | None = None  # whether any of the model's weights was, when the flags here were last set

    def __init__(self, model: nn.Module, found: list[Found], settings: PatchSettings):
        super().__init__()
        self._base = (model,)  # in a tuple: not a submodule
        self.settings, self.found = settings, tuple(found)
        shapes = [one.shape._replace(window=settings.window) for one in found]
        self.config = model_config(found[0], settings, len(found))
        windows = [one.window for one in found]
        self.cost_ratio, self.layer_cost = layer_costs(settings.prior, self.config, settings.context, windows)
        usual, costs = tuple(self.cost_ratio.tolist()), map(tuple, self.layer_cost.tolist())
        self._own_costs = {i: cost for i, cost in enumerate(costs) if cost != usual}  # of layers that slide already
        self.prior = layer_prior(settings.prior, self.cost_ratio, self.layer_cost)
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
        self.made_for = fingerprint(model)
        self._start_on_full()

    def _start_on_full(self) -> None:
        share = torch.full((len(self.settings.experts),), (1 - START_SHARE) / max(len(self.settings.experts) - 1, 1))
        share[self.experts.index("full")] = START_SHARE
        total = torch.tensor(self.prior.total_concentration)[:, None]
        self.controller.start_at((share * total).clamp_min(2 * self.controller.floor))
        self.follow()

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

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module, where and what the model's are now."""
        self.follow()
        return super().named_parameters(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> "RoutedModel":
        """Set the flags of what was added; they stay until the model's change."""
        self._trainable = any(p.requires_grad for p in self.model.parameters())
        super().requires_grad_(requires_grad)
        return self

    def follow(self) -> None:
        """Take over the model's device, its dtype where that is wider than float32, and its flags where they changed."""
        for index, one in enumerate(self.found):
            own = next((p for p in one.module.parameters() if not p.is_meta), None)  # offloaded weights are nowhere
            if own is not None:
                self._place(index, own)
        trainable = any(p.requires_grad for p in self.model.parameters())
        if trainable != self._trainable:
            self.requires_grad_(trainable)

    def _place(self, index: int, like: Tensor) -> None:
        """Move what was added to a layer beside `like`; parameters stay the same objects."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        mine = self.controller.layers[index].get_parameter("out.bias")
        if mine.device != like.device or mine.dtype != dtype:
            self.controller.layers[index].to(like.device, dtype)
            self.layers[index].to(like.device, dtype)

    @contextmanager
    def only_this(self, weights: bool = False) -> Iterator[None]:
        """Gradients for what was added alone, and for the model's own weights where asked; then all flags as they were."""
        mine, theirs = (
            [(p, p.requires_grad) for p in self.parameters()],
            [(p, p.requires_grad) for p in self.model.parameters()],
        )
        for p, _ in theirs:
            p.requires_grad_(weights)
        self.requires_grad_(True)
        try:
            yield
        finally:
            for p, flag in theirs:
                p.requires_grad_(flag)
            self.requires_grad_(True)  # notes the model's
            for p, flag in mine:
                p.requires_grad_(flag)

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
        if index == 0 and torch.is_grad_enabled():
            self.follow()  # flags
        self._place(index, hidden)
        if self._observe is not None:
            return self.experts.index("full")
        if self._route is None and self._force is not None:
            return forced_route(self._force, self.experts, len(self.layers))(index, hidden)
        hidden = normalised(hidden)
        if self._route is not None:
            return self._route(index, hidden)
        q = self.controller.posterior(index, hidden)
        executed = self.decide(index, q, self.mode or (RoutingMode.SAMPLE if self.training else RoutingMode.HARD))
        self._concentration[index], self._executed[index] = q.concentration, executed
        return executed

    def decide(self, index: int, q: Dirichlet, mode: RoutingMode) -> Tensor:
        """The route that a layer executes: a policy that knows costs is told the layer's own."""
        policy: Any = self.policy
        if index in self._own_costs and getattr(policy, "cost_ratio", None) == tuple(self.cost_ratio.tolist()):
            policy = replace(policy, cost_ratio=self._own_costs[index])
        return execute(q, mode, policy)

    def execute(self, index: int, route: Tensor | int, call: AttentionCall, hidden: Tensor) -> Tensor:
        """The output [B, H, Tq, Dv] of a layer's call under a route."""
        layer = self.layers[index]
        assert isinstance(layer, RoutedLayer)
        if self._observe is not None:
            self._observe(index, call, hidden)
        return layer.attend(call, route)

    @contextmanager
    def routed_by(self, route: Route) -> Iterator[None]:
        """Let `route(layer, hidden)` answer for every layer: a Pyro model, a recorder, a constant.

        Raises:
            ValueError: the model is not patched any more.
        """
        self.require_patched()
        before, self._route = self._route, route
        try:
            yield
        finally:
            self._route = before

    @contextmanager
    def observed_by(self, observe: Callable[[int, AttentionCall, Tensor], None]) -> Iterator[None]:
        """Run on full attention and show every call to `observe(layer, call, hidden)`; raises as `routed_by`."""
        self.require_patched()
        self._observe = observe
        try:
            yield
        finally:
            self._observe = None

    def kl(self) -> Tensor:
        """KL(posterior || prior) of the last pass, nats per token, summed over layers: task loss + weight * kl is an ELBO.

        The prior is tilted by its price: KL(q || Dirichlet) + price * cost . E_q[route] + log Z, a layer's own costs.

        Raises:
            ValueError: nothing was routed since the patch, or all of it was forced.
        """
        prior, tilt = self.prior.concentration, self.price * self.layer_cost  # [L, E]
        log_z = tilted_moments(prior, tilt).log_normaliser  # [L]
        terms = []
        for layer, q in enumerate(self._last()):
            paid = posterior_mean(q) @ tilt[layer].to(q) + log_z[layer].to(q)
            terms.append((dirichlet_kl(q, prior[layer].to(q)) + paid).mean())
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @property
    def price(self) -> float:
        """Of the prior's tilt, nats per unit of cost: where the fit ended, or as it was patched."""
        return self.settings.prior.price if self.fitted is None else self.fitted.price

    def statistics(self) -> list[RoutingStatistics]:
        """How each layer routed the last pass."""
        return [
            routing_statistics(
                concentration.detach(), self._executed[i].detach(), self.layer_cost[i].to(concentration.device), self.experts
            )
            for i, concentration in enumerate(self._last())
        ]

    def _last(self) -> list[Tensor]:
        unrouted = [one.name for i, one in enumerate(self.found) if i not in self._concentration]
        require(
            not unrouted,
            "last pass",
            f"posteriors of all {len(self.layers)} layers",
            f"none of {', '.join(unrouted)}",
            "run the model once, not forced; layers that never route (cross-attention) are left out by patch(layers=...)",
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

    def require_patched(self) -> None:
        """ValueError once `unpatch` was called."""
        got = f"{type(self.model).__name__}, unpatched"
        require(self.patched, "router", "a patched model", got, "patch it again, or load_patch what was saved")

    def save(self, folder: Any, held_out: bool = False) -> None:
        """Write what was added, see `load_patch`. None of your text is written, unless asked for.

        With `held_out` also up to 32,768 tokens of the text that `fit` held out, as they are, for `bayes-router inspect` and
        `report` to show; without them these ask for a text.

        Warns:
            UserWarning: the model's own weights moved since the patch (a fit with `weights_lr`, training of your own): the
                patch then fits that model alone, which has to be saved beside it.
        """
        from bayes_router.integrations.saving import save_router

        save_router(self, folder, held_out)

    def _bind(self) -> None:
        """Give every found module its binding."""
        for index, one in enumerate(self.found):
            setattr(one.module, BINDING, Binding(self, index))
            self._restore.append(partial(delattr, one.module, BINDING))  # a partial is copied with the model, a closure not


def all_on(route: Tensor | int, expert: int) -> bool:
    """Whether a route sends every token to one expert."""
    if isinstance(route, int):
        return route == expert
    return not route.is_floating_point() and bool((route == expert).all())


def normalised(hidden: Tensor) -> Tensor:
    """Scaled to unit root mean square, float32 at least: what a controller reads, on one scale in all layers and models."""
    return F.rms_norm(widen(hidden), hidden.shape[-1:])


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
