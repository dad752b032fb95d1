"""A patched model: controllers and experts beside a model made elsewhere.

And how its tokens are routed.

What is added lives here and not in the model: its parameters, state dict and `save_pretrained` stay
its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.kernels.capability import HAS_TRITON, TYPES
from bayes_router.checks import choose, require, whole
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.fused_router import (
    FULL_UP_TO,
    Settled,
    infer,
    takes_full,
)
from bayes_router.integrations.calls.layer import RoutedLayer
from bayes_router.integrations.calls.memory import Memories
from bayes_router.integrations.calls.precision import exact
from bayes_router.integrations.calls.tracing import exporting
from bayes_router.integrations.patch.binding import BINDING, Binding
from bayes_router.integrations.patch.cost import (
    counted_experts,
    layer_costs,
    layer_prior,
    layer_reads,
)
from bayes_router.integrations.patch.found import Found, model_config
from bayes_router.integrations.patch.identity import Identity, identity
from bayes_router.integrations.patch.passes import Here, Observe, recomputing
from bayes_router.integrations.patch.savable import Savable
from bayes_router.integrations.patch.settings import RouterConfig
from bayes_router.integrations.patch.sharing import share_gradients
from bayes_router.integrations.patch.watch import TrainingWatch
from bayes_router.routing.controller import MetaController
from bayes_router.routing.force import as_told
from bayes_router.routing.policy import Argmax, Policy
from bayes_router.transformer.fused import AnyWatched, controller_input
from bayes_router.types import Route, RouteBy, RoutingMode

START_SHARE = 0.9


class RoutedModel(Savable):
    """A model whose attention layers route their tokens; what `patch` returns.

    Its own state holds what was added and nothing else. Evaluation mode executes the policy's
    choice (HARD), training mode draws (SAMPLE); `mode` overrides. Unfitted, in evaluation mode,
    every token takes `full`: the model is unchanged.

    It follows its model, see `Following`.

    Attributes:
        model: the patched model itself, to be used as before.
        settings: what it was patched with.
        cost_ratio: [E], relative to attention over all keys = 1.
        layer_cost: [L, E], the same by layer: a layer that slides already pays for its own window
            alone.
        layer_reads: [L, E], the keys and values that a decoding step reads by layer and expert, all
            = 1.
        policy: of HARD.
        mode: overrides what train and eval mode imply.
        fitted: how it was fitted; None before.
        held_out: text that `fit` did not read.
        frozen: units whose route is static; None: every unit chooses.
        made_for: identity of the model as it was patched; None once `fit` moved its own weights.
        full_up_to: on a GPU, in evaluation mode, where the experts are full and local: a text of at
            most so many tokens takes `full` for all of them, exactly as unpatched, as routing would
            cost more time than it saves; `last.on_full` says so. 0: every text is routed.
    """

    _full_up_to: int = FULL_UP_TO

    def __init__(self, model: nn.Module, found: list[Found], settings: RouterConfig):
        super().__init__(model, found)
        self.settings = settings
        shapes = [one.shape._replace(window=settings.window) for one in found]
        self.config = model_config(found[0], settings, len(found))
        windows = [one.window for one in found]
        self.cost_ratio, self.layer_cost = layer_costs(
            settings.prior, self.config, settings.context, windows
        )
        self.layer_reads = layer_reads(self.config, settings.context, windows)
        heads = {(one.shape.num_heads, one.kv_heads) for one in found}
        alike = settings.route_by == RouteBy.LAYER.value or len(heads) == 1
        require(
            alike,
            "route_by",
            "layer, for a model whose layers have different numbers of heads",
            settings.route_by,
        )
        self._usual_costs = tuple(self.cost_ratio.tolist())
        costs = enumerate(map(tuple, self.layer_cost.tolist()))
        self._own_costs = {i: cost for i, cost in costs if cost != self._usual_costs}
        self.prior = layer_prior(
            settings.prior, self.cost_ratio, self.layer_cost, self.config.num_units
        )
        self.controller = MetaController(
            found[0].width,
            len(found),
            len(settings.experts),
            settings.controller_hidden,
            settings.concentration_floor,
            self.config.num_units,
        )
        self.layers = nn.ModuleList(
            RoutedLayer(settings.experts, shape, one.kv_heads, settings.sinks, one.causal)
            for one, shape in zip(found, shapes, strict=True)
        )
        self.policy: Policy = Argmax()
        self.here, self.watch = Here(), TrainingWatch(self)
        self._settled, self._watched = Settled(), AnyWatched()
        self.undo: list[Callable[[], None]] = []
        self.memories = Memories()
        self.made_for: Identity | None = identity(model)
        self._start_on_full()

    def _start_on_full(self) -> None:
        share = torch.full(
            (len(self.settings.experts),),
            (1 - START_SHARE) / max(len(self.settings.experts) - 1, 1),
        )
        share[self.experts.index("full")] = START_SHARE
        total = self.prior.totals
        self.controller.start_at((share * total).clamp_min(2 * self.controller.floor))
        self.follow()

    @property
    def counted_experts(self) -> list[Expert]:
        """The experts as the cost models count them."""
        return counted_experts(self.config)

    def attend(self, index: int, hidden: Tensor, call: AttentionCall, cache: Any = None) -> Tensor:
        """What a patched layer calls.

        hidden [B, Tq, D], the call after the KV cache -> [B, H, Tq, Dv].
        """
        return self.execute(index, self.route_call(index, hidden, call), call, hidden)

    def route_call(self, index: int, hidden: Tensor, call: AttentionCall) -> Tensor | int:
        """`route` of the queries of a call, which a policy that remembers texts may look at."""
        if call.causal and call.q.shape[2] == call.k.shape[2] and self.leaves(index, hidden):
            return self.experts.index("full")
        self.here.call = call
        try:
            return self.route(index, hidden, call.real_queries())
        finally:
            self.here.call = None

    def route(self, index: int, hidden: Tensor, real: Tensor | None = None) -> Tensor | int:
        """Where the tokens of a layer go.

        Weights [B, T, R, E], choices int64 [B, T, R], or one expert for all.

        `real` [B or 1, T] is False on padding; None: every token is one.
        """
        if index == 0 and torch.is_grad_enabled():
            self.follow()  # flags
        self.place(index, hidden)
        if self.here.observe is not None:
            return self.experts.index("full")
        again = recomputing()
        if not again:
            self.here.begin(index).real[index] = real
        if self.here.route is None and self._force is not None:
            return as_told(self._force, self.experts)(index, hidden)
        require(
            self.here.route is not None or not exporting(),
            "torch.export",
            "every token on one expert: routes depend on the data, an exported program cannot",
            "a patched model that routes",
            "router.force('full'), another expert, or unpatch() first",
        )
        with exact(hidden.device):
            if self.here.route is not None:
                return self.here.route(index, controller_input(hidden))
            mode, decide = self._mode, partial(self.decide, index)
            policy = None if self.frozen is not None else self._policy_of(index)
            q, executed, one = infer(
                self.posterior, self.controller, index, hidden, mode, policy, self._settled, decide
            )
        if not again:
            if self.training:
                self.watch.drawn(index)
            self.note(index, q, executed)
        return executed if one is None else one

    @property
    def _mode(self) -> RoutingMode:
        if self.mode is None:
            return RoutingMode.SAMPLE if self.training else RoutingMode.HARD
        return choose("mode", self.mode, RoutingMode)

    @property
    def executes(self) -> bool:
        """Whether passes execute the policy's choice, and nobody looks on."""
        return self.unasked and not self._watched(self.controller.layers._modules.values())

    @property
    def unasked(self) -> bool:
        """`executes`, but for hooks on controllers."""
        free = self.here.route is None and self.here.observe is None and not torch.is_grad_enabled()
        return free and self.frozen is None and self._mode is RoutingMode.HARD

    def leaves(self, index: int, hidden: Tensor, cache: Any = None) -> bool:
        """Whether a text [B, T, D] over itself is so short that a layer's routing is left alone,
        see `full_up_to`; then the pass says so.
        """
        T = hidden.shape[1]
        short = takes_full(hidden, T, self.experts, self.full_up_to)
        left = short and self._force is None and self.executes
        self.here.left = (index + 1, T, id(cache)) if left else None
        if left:
            routed = self.here.begin(index)
            routed.real[index] = None
            routed.on_full.add(index)
        return left

    def still_leaves(self, index: int, hidden: Any, cache: Any) -> bool:
        """`leaves` in short, where the layer before was left in this very pass: the host pays for
        what is asked in every layer.
        """
        here = self.here
        left = here.left
        if left is None or left[0] != index or not isinstance(hidden, Tensor):
            return False
        told = self._force is not None or here.route is not None or here.observe is not None
        long = hidden.shape[1] != left[1] or left[1] > self._full_up_to
        if told or long or left[2] != id(cache) or torch.is_grad_enabled():
            return False
        here.left = index + 1, left[1], left[2]
        routed = here.slot.last
        routed.real[index] = None
        routed.on_full.add(index)
        if here.given:
            here.given.pop(index, None)
        return True

    def steps_in_place(self, index: int, hidden: Tensor) -> bool:
        """Whether a new token of a layer may be attended behind a cache whose length no host knows:
        see `decode_step`.
        """
        known = all(name in ("full", "local") for name in self.experts) and self.found[index].causal
        sizes = (
            hidden.is_cuda
            and hidden.dtype in TYPES
            and self.found[index].shape.head_dim in (16, 32, 64, 128, 256)
        )
        weighed = isinstance(self._force, Tensor) and self._force.is_floating_point()
        return known and sizes and HAS_TRITON and self.executes and not weighed

    def execute(
        self, index: int, route: Tensor | int, call: AttentionCall, hidden: Tensor
    ) -> Tensor:
        """The output [B, H, Tq, Dv] of a layer's call under a route."""
        layer = self.layers[index]
        assert isinstance(layer, RoutedLayer)
        if self.here.observe is not None:
            self.here.observe(index, call, hidden)
        out = layer.attend(call, route)
        if index == len(self.layers) - 1:
            self.here.slot.release_after(out, self.watch.went_backward)
        return out

    @contextmanager
    def routed_by(self, route: Route) -> Iterator[None]:
        """Let `route(layer, hidden)` answer for every layer: a Pyro model, a recorder, a constant.

        Raises:
            ValueError: the model is not patched any more.
        """
        self.require_patched()
        before, self.here.route = self.here.route, route
        try:
            yield
        finally:
            self.here.route = before

    @contextmanager
    def observed_by(self, observe: Observe) -> Iterator[None]:
        """Run on full attention and show every call to `observe(layer, call, hidden)`.

        Raises as `routed_by`.
        """
        self.require_patched()
        before, self.here.observe = self.here.observe, observe
        try:
            yield
        finally:
            self.here.observe = before

    @property
    def observed(self) -> bool:
        """Whether calls are shown to an observer, every token on full attention."""
        return self.here.observe is not None

    def unpatch(self) -> nn.Module:
        """Take everything off the model again and return it.

        Its outputs are then exactly what they were.
        """
        while self.undo:
            self.undo.pop()()
        return self.model

    @property
    def full_up_to(self) -> int:
        """See the class."""
        return self._full_up_to

    @full_up_to.setter
    def full_up_to(self, tokens: int) -> None:
        self._full_up_to = whole("full_up_to", tokens, 0)

    @property
    def graphs(self) -> bool:
        """Whether the model's own calls are replayed from CUDA graphs: of language models alone."""
        return False

    @graphs.setter
    def graphs(self, on: bool) -> None:
        got = type(self.model).__name__
        require(not on, "graphs", "a causal language model of transformers", got, "leave it out")

    @property
    def patched(self) -> bool:
        """Whether the model still routes."""
        return bool(self.undo)

    def require_patched(self) -> None:
        """ValueError once `unpatch` was called."""
        got = f"{type(self.model).__name__}, unpatched"
        require(
            self.patched,
            "router",
            "a patched model",
            got,
            "patch it again, or load_patch what was saved",
        )

    def share_gradients(self) -> None:
        """Let the processes that train one model step alike: between backward() and step().

        Each gradient of what was added becomes its mean over the processes of `torch.distributed`,
        as DistributedDataParallel does with those of the model. `RoutingTrainer` calls it.
        """
        self.watch.shared = share_gradients(self.parameters()).size > 1

    def bind(self) -> None:
        """Give every found module its binding."""
        for index, one in enumerate(self.found):
            setattr(one.module, BINDING, Binding(self, index))
            # a partial is copied with the model, a closure not
            self.undo.append(partial(delattr, one.module, BINDING))
