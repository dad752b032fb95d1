"""A patch stands aside while a text that is left alone goes through its model.

What a hook asks in every layer is time of the host, which a short text waits for. So the first
layer, where it is left alone, takes the other layers' hooks off them and gives the model its own
attention function back, for the rest of this call of the stack; whatever ends the call, all of it
is in its place again. Where another thread is inside, where a layer has hooks of others too, and
where layers are called one by one, everything stays, and each layer is asked.
"""

import threading
from collections import deque
from collections.abc import Sequence
from itertools import chain
from operator import methodcaller, setitem
from typing import Any

import torch
from torch import nn

from bayes_router.integrations.huggingface.interface import NAME, keep_hidden
from bayes_router.integrations.patch.binding import Bindable, Binding

_turn = threading.Lock()


class Aside:
    """The hooks of layers that can stand aside, and whether they do.

    A layer that somebody calls by itself, in another thread and while they do, is not routed. They
    are taken off and put back in C: the host has none of them in its caches.
    """

    def __init__(self, router: Bindable, base: str, configs: Sequence[Any]):
        self._router, self._base, self._configs = router, base, configs
        self._of: list[dict[int, Any]] = []
        self._numbers: list[int] = []
        self._hooks: list[Any] = []
        self._off = False
        self._inside = set[int]()  # threads in a call of the stack
        self._stood: int | None = None  # the one whose call the hooks stood aside in

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_inside": set(), "_stood": None}

    def add(self, hooks: dict[int, Any], number: int) -> None:
        """A hook of a layer, among those of its kind."""
        self._of.append(hooks)
        self._numbers.append(number)
        self._hooks.append(hooks[number])

    def watch(self, stack: nn.Module) -> Sequence[Any]:
        """See where calls of the stack begin and end; handles, to remove it."""
        begin = stack.register_forward_pre_hook(self.enter)
        return begin, stack.register_forward_hook(self.leave, always_call=True)

    def enter(self, *_: Any) -> None:
        """Forward pre-hook of the stack."""
        if torch.compiler.is_compiling():
            return
        with _turn:
            self.back()
            self._inside.add(threading.get_ident())

    def leave(self, *_: Any) -> None:
        """Forward hook of the stack, called whatever ends the call."""
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        with _turn:
            self.back()
            self._inside.discard(me)
            stood, self._stood = self._stood, None if self._stood == me else self._stood
        if stood == me:
            passed, layers = self._router.here.slot.last, range(len(self._router.found))
            passed.real, passed.on_full = dict.fromkeys(layers), {*layers}

    def stand(self) -> None:
        """Let layers be called without hooks until the stack's call ends, if they have none of
        others, and nobody else is in a call.
        """
        me = threading.get_ident()
        with _turn:
            if self._inside != {me} or [*chain.from_iterable(self._of)] != self._numbers:
                return
            deque(map(methodcaller("clear"), self._of), maxlen=0)
            self._off, self._stood, self._router.here.left = True, me, None
            self._switch(NAME.format(self._base), self._base)

    def back(self) -> None:
        """All in its place again."""
        if self._off:
            deque(map(setitem, self._of, self._numbers, self._hooks), maxlen=0)
            self._off = False
            self._switch(self._base, NAME.format(self._base))

    def _switch(self, name: str, to: str) -> None:
        for config in self._configs:  # without what transformers looks up around it
            if object.__getattribute__(config, INTERNAL) == name:
                object.__setattr__(config, INTERNAL, to)


INTERNAL = "_attn_implementation_internal"
"""Where a config of transformers has the name of its attention function."""


def keep_first(
    aside: Aside, binding: Binding, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """`keep_hidden` of the first layer: where it is left alone, so is all that follows."""
    keep_hidden(binding, module, args, kwargs)
    if torch.compiler.is_compiling():
        return
    if binding.router.here.left is not None:
        aside.stand()
