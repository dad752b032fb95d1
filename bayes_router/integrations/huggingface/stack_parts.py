"""Whether the modules of a stack, and what lies in them, are as they were."""

from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from bayes_router.integrations.huggingface.replayable import idle
from bayes_router.routing.watch import Look


class Parts:
    """The modules of a stack as they were: what a replay passes by, and where weights lie.

    A device waits while a call asks: modules and hooks are walked through in C.
    """

    def __init__(self, base: nn.Module, controller: nn.Module):
        modules, ours = list(base.modules()), list(controller.modules())
        self._controller = controller
        both = [(m._modules, n) for m in modules + ours for n in m._modules]
        self._of, self._names = [of for of, _ in both], [name for _, name in both]
        self._children = [*map(dict.get, self._of, self._names)]
        self._weights = [(m._parameters, n) for m in modules for n in m._parameters]
        self._buffers = [(m._buffers, n) for m in modules + ours for n in m._buffers]
        self._ours = [(m._parameters, n) for m in ours for n in m._parameters]
        hooked = [m for m in modules + ours if m is not base]
        self._hooks = [x for m in hooked for x in (m._forward_hooks, m._forward_pre_hooks)]
        self._kinds = [type(m).__name__ for m in hooked for _ in range(2)]
        self._idle: list[Any] = []  # hooks that were found to be

    def same(self, controller: nn.Module) -> bool:
        """Whether these are the modules still, and this their controller."""
        now = map(dict.get, self._of, self._names)
        return controller is self._controller and all(map(is_, now, self._children))

    def hooked(self) -> str | None:
        """Why hooks on modules would miss a replay; None: they would not."""
        found = [*chain.from_iterable(map(dict.values, filter(None, self._hooks)))]
        if found != self._idle:
            for kind, hooks in zip(self._kinds, self._hooks, strict=True):
                if any(isinstance(hook, Look) for hook in hooks.values()):
                    return "a watched pass, which looks at what controllers read"
                if not all(map(idle, hooks.values())):
                    return f"a hook on {kind}, which a replay would pass by"
            self._idle = found
        return None

    def state(self) -> tuple[Any, ...]:
        """Where each weight lies, in order, and what was last written to those of controllers."""
        ours = [
            None if (p := at.get(n)) is None else (p.data_ptr(), p._version) for at, n in self._ours
        ]
        model = [None if (p := at.get(n)) is None else p.data_ptr() for at, n in self._weights]
        return tuple(model), tuple(ours)

    def weights(self) -> list[Tensor]:
        """All that passes read, as it is now, whatever takes its place."""
        read = [at.get(n) for at, n in self._weights + self._ours + self._buffers]
        return [x.detach() for x in read if x is not None]
