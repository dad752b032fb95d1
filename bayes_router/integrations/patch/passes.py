"""What belongs to a pass and not to the model.

Every thread has its own, and no copy, pickle or state dict carries it.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.types import Route

Observe = Callable[[int, AttentionCall, Tensor], None]


@dataclass(eq=False)
class Pass:
    """How one pass routed its tokens.

    A handle that keeps the pass's graph alive for as long as it is kept.

    Attributes:
        concentration: by layer, [B, T, R, E], of the posteriors.
        executed: by layer, weights [B, T, R, E] or choices int64 [B, T, R].
        real: by layer, [B or 1, T] bool, False on padding; None: no token is padding.
        kl_taken: its KL was asked for.
        on_full: layers whose text was so short that every token took `full` and nothing was routed,
            see `full_up_to`.
        replayed: from a CUDA graph, whose memory the numbers are: the next replay writes over them.
        as_called: why it was not, where the setting `graphs` is on.
    """

    concentration: dict[int, Tensor] = field(default_factory=dict)
    executed: dict[int, Tensor] = field(default_factory=dict)
    real: dict[int, Tensor | None] = field(default_factory=dict)
    kl_taken: bool = False
    on_full: set[int] = field(default_factory=set)
    replayed: bool = False
    as_called: str | None = None

    def detached(self) -> "Pass":
        """The same numbers without the graph."""
        numbers = {layer: x.detach() for layer, x in self.concentration.items()}
        executed = {layer: x.detach() for layer, x in self.executed.items()}
        return Pass(numbers, executed, dict(self.real), self.kl_taken, set(self.on_full))

    def mean(self, layer: int, values: Tensor) -> Tensor:
        """The mean of values [B, T, ...] of a layer over its real tokens."""
        real = self.real.get(layer)
        if real is None:
            return values.mean()
        share = real.expand(values.shape[:2]).to(values)
        return (values.flatten(2).mean(2) if values.dim() > 2 else values).mul(
            share
        ).sum() / share.sum().clamp_min(1)

    def tokens(self, layer: int, values: Tensor) -> Tensor:
        """The real tokens' values [B, T, ...] of a layer: [1, n, ...]."""
        real = self.real.get(layer)
        return (
            values.flatten(0, 1)[None]
            if real is None
            else values[real.expand(values.shape[:2])][None]
        )


class Given(NamedTuple):
    """What the hook before an attention module hands to its attention function."""

    hidden: Tensor
    # the KV cache, and what it held of this layer's keys
    past: tuple[Any, Tensor | None] | None = None
    # tokens in a static cache before this call, whose later slots are empty; None: no such cache
    filled: int | None = None
    # the same on the device, which the call will have counted up; None: nobody waits for it
    held: Tensor | None = None


class Slot:
    """Holds the last pass of one thread.

    Its graph goes with the next pass, or with its own backward pass.
    """

    def __init__(self) -> None:
        self.last = Pass()

    def release_after(self, out: Tensor, then: Callable[[Pass], None]) -> None:
        """Give up the last pass's graph once a backward pass goes through `out`.

        Who holds `last` keeps it.

        `then(pass)`, a method, is called at that time.
        """
        if out.requires_grad and not torch.compiler.is_compiling():  # the graph owns none of these
            out.register_hook(
                partial(
                    _release, weakref.ref(self), weakref.ref(self.last), weakref.WeakMethod(then)
                )
            )


def _release(
    slot: "weakref.ref[Slot]",
    of: "weakref.ref[Pass]",
    then: "weakref.WeakMethod[Any]",
    grad: Tensor,
) -> None:
    holder, passed, tell = slot(), of(), then()
    if passed is not None and tell is not None:
        tell(passed)
    if holder is not None and passed is not None and holder.last is passed:
        holder.last = passed.detached()


class Here(threading.local):
    """What one thread is doing with a patched model.

    Attributes:
        slot: of the pass under way or, after it, the last one.
        route: what answers for every layer in place of posterior and policy.
        observe: what is shown every call.
        given: by layer, what the layer's own call has yet to take.
        decided: by layer, a route that the call under way will execute.
        call: that a layer makes; None where it keeps nothing between passes.
        left: the layer that comes next in a pass whose short text is left alone, the number of its
            tokens and the identity of its cache.
    """

    def __init__(self) -> None:
        self.slot = Slot()
        self.route: Route | None = None
        self.observe: Observe | None = None
        self.given: dict[int, Given] = {}
        self.decided: dict[int, Tensor | int] = {}
        self.call: AttentionCall | None = None
        self.left: tuple[int, int, int] | None = None

    def __reduce__(self) -> Any:
        return Here, ()  # a copy of the model starts with none of it

    def begin(self, layer: int) -> Pass:
        """The pass that a layer belongs to: a new one where this one has that layer already."""
        if layer == 0 or layer in self.slot.last.real:
            self.slot.last = Pass()
        return self.slot.last


def recomputing() -> bool:
    """Whether a backward pass runs this layer once more (gradient checkpointing).

    Its routes are known already.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpointed_without_graph() -> bool:
    """Whether a reentrant checkpoint runs this layer.

    Without a graph, so that no KL taken of this pass has a gradient.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
