"""What a patched module holds, and by what name.

The way from a model's own attention call to its router.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.memory import Memories
from bayes_router.integrations.patch.found import Found
from bayes_router.integrations.patch.passes import Given, Here

BINDING = "_bayes_router"

_numbers = itertools.count()
_numbered: "weakref.WeakValueDictionary[int, Number]" = weakref.WeakValueDictionary()


class Bindable(Protocol):
    """What a binding asks of the router that it belongs to."""

    @property
    def experts(self) -> Sequence[str]:
        """Names, in the order of the routing latent."""

    @property
    def model(self) -> nn.Module:
        """The patched model."""

    found: tuple[Found, ...]
    memories: Memories
    here: Here

    def attend(self, index: int, hidden: Tensor, call: AttentionCall, cache: Any = None) -> Tensor:
        """Route and execute the call of a layer, whose keys come from `cache`."""

    def route(self, index: int, hidden: Tensor, real: Tensor | None = None) -> Tensor | int:
        """Where the tokens of a layer go."""

    def execute(
        self, index: int, route: Tensor | int, call: AttentionCall, hidden: Tensor
    ) -> Tensor:
        """The output of a layer's call under a route."""

    @property
    def observed(self) -> bool:
        """Whether calls are shown to an observer, every token on full attention."""

    def leaves(self, index: int, hidden: Tensor, cache: Any = None) -> bool:
        """Whether a short text over itself is left alone, and noted to be."""

    def still_leaves(self, index: int, hidden: Any, cache: Any) -> bool:
        """`leaves`, where the layer before was left in this pass."""

    def steps_in_place(self, index: int, hidden: Tensor) -> bool:
        """Whether a new token of a layer may be attended behind a cache whose length no
        host knows.
        """


class Binding:
    """What a patched module holds: its router and its index there.

    What a call hands over lies in `router.here`.
    """

    def __init__(self, router: Bindable, index: int):
        self.router, self.index = router, index
        self.crossed = False  # it was called as cross-attention
        self.number = Number(self)

    def give(self, given: Given | None) -> None:
        """Hand over what the call under way needs; None: the call is left alone."""
        if given is None:
            self.router.here.given.pop(self.index, None)
        else:
            self.router.here.given[self.index] = given

    @property
    def awaits(self) -> bool:
        """Whether a call is under way and was not answered yet."""
        return self.index in self.router.here.given

    @property
    def filled(self) -> int | None:
        """See `Given`, of the call under way."""
        return self.router.here.given[self.index].filled

    @property
    def held(self) -> Tensor | None:
        """See `Given`, of the call under way."""
        return self.router.here.given[self.index].held

    def take(self) -> Given:
        """What the call under way was given, which is answered with it."""
        return self.router.here.given.pop(self.index)

    def attend(self, call: AttentionCall) -> Tensor:
        """Route the call's queries and execute it: [B, H, Tq, Dv]."""
        hidden, past, *_ = self.take()
        if past is not None:
            memory = self.router.memories.of(past[0], self.index)
            memory.follow(past[1], call.k, call.q.shape[2], *call.real_keys())
            call = replace(call, memory=memory)
        return self.router.attend(self.index, hidden, call, None if past is None else past[0])

    def name_crossing(self) -> None:
        """Warn, once, of a call that is not routed: query and key are two tensors."""
        if not self.crossed:
            name = self.router.found[self.index].name or type(self.router.model).__name__
            warnings.warn(
                f"{name}: called as cross-attention (its query is not its key): such calls are not "
                f"routed and run as before; "
                "pass one tensor as both, or leave the module out by patch(layers=...)",
                stacklevel=4,
            )
        self.crossed = True

    def require_full(self, asked: str) -> None:
        """Route the call's queries and see that `full` takes them all.

        The original may answer what no expert can.

        Raises:
            ValueError: some take another expert; `asked` names the argument.
        """
        route = self.router.route(self.index, self.take().hidden)
        require(
            all_on(route, self.router.experts.index("full")),
            asked,
            "False where tokens are routed: a mixture of experts has no attention weights",
            True,
            "force('full'), or unpatch() first",
        )


class Number:
    """What a compiled graph knows of a binding: an integer. A copy of the binding has its own.

    Attributes:
        value: the integer.
    """

    def __init__(self, binding: Binding):
        self._binding, self.value = weakref.ref(binding), next(_numbers)
        _numbered[self.value] = self

    def __reduce__(self) -> Any:
        return Number, (self._binding(),)

    @staticmethod
    def binding(value: int) -> Binding:
        """Whose this number is."""
        found = _numbered[value]._binding()
        assert found is not None
        return found


def router_of(model: nn.Module) -> Bindable | None:
    """The router of a patched model, also inside a wrapper; None: it is not patched."""
    left = [model]
    while left:  # in the order of modules(), which takes many times as long
        module = left.pop()
        binding = module.__dict__.get(BINDING)
        if isinstance(binding, Binding):
            return binding.router
        left.extend(filter(None, reversed(module._modules.values())))
    return None


def all_on(route: Tensor | int, expert: int) -> bool:
    """Whether a route sends every token to one expert."""
    if isinstance(route, int):
        return route == expert
    return not route.is_floating_point() and bool((route == expert).all())


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let `forward(module, ...)` answer for one module; what undoes it.

    Both are partials of functions: pickle finds a bound method by its name, which is the class's
    own, and copying takes a builtin method along as it is, with the original's module. Hooks of
    accelerate, before the patch or after it, stay.
    """
    setattr(module, WRAPPED if hasattr(module, WRAPPED) else "forward", partial(forward, module))
    return partial(_own_forward, module, forward)


def _own_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    if getattr(module.__dict__.get(WRAPPED), "func", None) is forward:
        setattr(module, WRAPPED, MethodType(type(module).forward, module))
    elif getattr(module.__dict__.get("forward"), "func", None) is forward:
        del module.forward


WRAPPED = "_old_forward"
"""Where accelerate keeps the forward pass that its own calls."""
