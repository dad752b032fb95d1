"""The evidence of the passes made under `watching`, and what the controllers read in them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from bayes_router.checks import require
from bayes_router.routing.evidence import Evidence

CHUNK = 128  # tokens at a time in a running mean


class RunningMean:
    """Means over the last tokens, exponentially forgotten.

    m[t] = sum_s g^(t-s) x[s] / sum_s g^(t-s), g = 1 - 1 / memory.

    Nothing depends on later tokens. `memory` 1 is the token alone.
    """

    def __init__(self, memory: int, state: Tensor | None = None):
        self.decay = 1 - 1 / memory
        self.state = state  # [2, B]: sum, and sum of weights

    def __call__(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """The means at x [B, T], which go on from those of the last call.

        `real` [B, T] is False where there is no token.

        Padding is as though it were not there; the means on it say nothing.
        """
        state = x.new_zeros(2, x.shape[0]) if self.state is None else self.state
        if real is None:
            sums = self._sums(x, state)
            self.state = sums[..., -1] if x.shape[1] else state
            return _ratio(sums)
        real = real.expand(x.shape)
        order = (~real).byte().argsort(dim=1, stable=True)  # real tokens first
        sums = self._sums(torch.where(real, x, 0.0).gather(1, order), state)
        whole = torch.cat([state[..., None], sums], -1)
        self.state = whole.gather(-1, real.sum(1).expand(2, -1)[..., None])[..., 0]
        return torch.empty_like(x).scatter(1, order, _ratio(sums))

    def _sums(self, x: Tensor, state: Tensor) -> Tensor:
        """Of values and of weights, [2, B, T]."""
        both = torch.stack([x, torch.ones_like(x)])
        both[..., :1] += self.decay * state[..., None]
        return _fading_sums(both, self.decay)


def _fading_sums(x: Tensor, decay: float) -> Tensor:
    """y[t] = x[t] + decay y[t-1] along the last axis: sums of chunks, and of the chunks' ends."""
    T = x.shape[-1]
    n = min(CHUNK, T)
    power = torch.arange(n, device=x.device)
    gap = (power[:, None] - power).to(x)  # [t, s]
    mix = torch.where(gap >= 0, decay ** gap.clamp_min(0), 0.0)
    if n == T:
        return x @ mix.T
    inside = F.pad(x, (0, -T % n)).unflatten(-1, (-1, n)) @ mix.T  # [..., chunks, n]
    ends = _fading_sums(inside[..., -1], decay**n)
    before = F.pad(ends, (1, -1))[..., None]  # of the chunk before each
    return (inside + before * decay ** (power + 1).to(x)).flatten(-2)[..., :T]


def _ratio(sums: Tensor) -> Tensor:
    return sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny)


class Watch:
    """The evidence of the passes made under `watching`: of the last one, [B, T] a layer."""

    def __init__(self, evidence: Evidence, memory: int, real: Tensor | None = None):
        require(memory >= 1, "memory", "at least 1 token", memory)
        self.evidence, self.memory, self.real = evidence, memory, real
        self._new: dict[int, Tensor] = {}  # distances [B, T] of layers that were seen since
        self._last: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}  # of the running means, [2, B]

    def see(self, layer: int, hidden: Tensor) -> None:
        """Take in what the controller of a layer reads.

        One token goes on with the texts at hand, more start texts anew.
        """
        self.take(layer, self.evidence.of(layer).distance(hidden.detach()))

    def take(self, layer: int, distance: Tensor) -> None:
        """As `see`, of what is at `distance` [B, T] from the fit's text.

        What follows is done for all layers together: small operators take a GPU's host longer than
        the GPU.
        """
        waiting = next(iter(self._new.values()), distance)
        if layer in self._new or waiting.shape != distance.shape:
            self._settle()
        self._new[layer] = distance

    def _settle(self) -> None:
        """From distances to running means, of the layers that wait for it."""
        new, self._new = self._new, {}
        if not new:
            return
        layers, device = sorted(new), next(iter(new.values())).device
        distance = torch.stack([new[layer].to(device) for layer in layers])  # [L, B, T]
        L, B, T = distance.shape
        goes_on = T == 1 and all(layer in self._states for layer in layers)
        state, real = None, self.real
        if goes_on:
            state = torch.cat([self._states[layer] for layer in layers], 1)
        if real is not None:
            real = None if goes_on else real.to(device).expand(B, T).repeat(L, 1)
        mean = RunningMean(self.memory, state)
        recent = mean(self.evidence.log_granted(layers, distance).flatten(0, 1), real)
        assert mean.state is not None
        states = mean.state.unflatten(1, (L, B)).unbind(1)
        self._states.update(zip(layers, states, strict=True))
        self._last.update(zip(layers, recent.unflatten(0, (L, B)), strict=True))

    @property
    def last(self) -> dict[int, Tensor]:
        """By layer, means of log n over the last tokens of the last pass, [B, T]."""
        self._settle()
        return self._last

    @property
    def log_evidence(self) -> Tensor:
        """Of the last pass, [L, B, T]: means of log n over the last tokens."""
        last = self.last
        return torch.stack([last[layer] for layer in sorted(last)]).cpu()

    def total(self) -> Tensor:
        """The total concentration n_post of the last pass, [L, B, T]."""
        return self.evidence.prior_total.cpu()[:, None, None] + self.log_evidence.exp()


@contextmanager
def watching(
    controller: Any, memory: int | None = None, real: Tensor | None = None
) -> Iterator[Watch]:
    """Compute the evidence of the passes of this thread inside; nothing is computed outside.

    Args:
        controller: the `MetaController` of a fitted run or patch.
        memory: tokens of the running mean; 1 is each token alone. Default that of the fit.
        real: [B, T], False on padding, of passes of several tokens.

    Raises:
        ValueError: the fit kept no evidence.
    """
    evidence = evidence_of(controller)
    watch = Watch(evidence, evidence.memory if memory is None else memory, real)
    with _shown(controller, watch.see, watch):
        yield watch


@contextmanager
def inputs_of(controller: Any) -> Iterator[list[Tensor]]:
    """What the controllers read in the pass made inside, by this thread.

    hidden [B, T, D] of each layer.
    """
    found: list[Tensor] = []
    with _shown(controller, lambda layer, hidden: found.append(hidden.detach())):
        yield found


class Look:
    """A forward pre-hook of a layer's controller that shows what is read there, to its thread.

    A kernel that takes a controller's place need not stay away: it asks for the `looks` of this
    thread, and shows them the same, or to a `watch` the distance alone.
    """

    def __init__(self, layer: int, see: Callable[[int, Tensor], None], watch: Watch | None):
        self.layer, self.see, self.watch = layer, see, watch
        self._thread = threading.get_ident()

    @property
    def mine(self) -> bool:
        """Whether it was made by this thread."""
        return threading.get_ident() == self._thread

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Show the input of a call of the controller."""
        if self.mine:
            self.see(self.layer, inputs[0])


def looks(controller: nn.Module) -> list[Look]:
    """Who of this thread looks at what a layer's controller reads."""
    hooks = controller._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, Look) and hook.mine]


@contextmanager
def _shown(
    controller: Any, see: Callable[[int, Tensor], None], watch: Watch | None = None
) -> Iterator[None]:
    """Show `see` the layer and the input of each call of a controller that this thread makes."""
    handles: list[RemovableHandle] = []
    try:
        for layer, module in enumerate(controller.layers):
            handles.append(module.register_forward_pre_hook(Look(layer, see, watch)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def evidence_of(controller: Any) -> Evidence:
    """What a fit kept beside its controller.

    Raises:
        ValueError: nothing.
    """
    evidence: Evidence | None = getattr(controller, "evidence", None)
    if evidence is None:
        raise ValueError(
            "evidence: expected a density of the fit's text beside the controller; got a fit "
            "without one; make it from text "
            "that is like the fit's: fit_evidence(texts)"
        )
    return evidence
