"""The setting `graphs` of a patched language model: its own calls, replayed from CUDA graphs.

`model(...)` and `model.generate(..., cache_implementation="static")` stay what they are. The stack
of layers below the head answers a prompt (padded to a bucket of lengths) and steps behind a static
cache by a replay; head, loss, sampling and whatever else stands around it run as ever. What cannot
be replayed runs as it is called, and `router.last.as_called` says why.

A graph is of memory: keys of the caches that `generate` makes are lent from a store, which is lent
again when the cache is gone. Another policy, other weights, a fit: all graphs are captured anew.
Until then, or until the setting is off, weights that were replaced are kept.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from bayes_router.checks import require
from bayes_router.integrations.huggingface.graphs import Graphs, Keys, Read, require_cuda
from bayes_router.integrations.huggingface.language import RoutedLanguage
from bayes_router.integrations.huggingface.replayable import GROWING, Replayable, read
from bayes_router.integrations.huggingface.stack_parts import Parts
from bayes_router.integrations.patch.binding import replace_forward
from bayes_router.integrations.patch.passes import Pass

STORES = 4  # stores of keys that are kept, with their graphs
LEAST = 64  # tokens in a bucket
MOVED = "modules of another kind"
NATIVE = ("full", "local")
REPLAY = "_bayes_router_replay"
"""By this name a stack has its `Replay`."""
ANSWERED = ("last_hidden_state", "past_key_values")


def switch_on(router: RoutedLanguage) -> list[Callable[[], None]]:
    """Let the stack of a patched model be replayed where it can; what undoes it.

    Raises:
        ValueError: not on a CUDA device, experts whose passes wait for it, another kernel than
            sdpa, layers that slide, or a model that is no plain stack of layers.
    """
    model: Any = router.model
    require_cuda(model)
    fix = "leave graphs out"
    own = [name for name in router.experts if name not in NATIVE]
    require(not own, "graphs", "experts of full and local, which never wait", router.experts, fix)
    kernel = str(model.config._attn_implementation)
    require(kernel.endswith("sdpa"), "graphs", "sdpa", kernel, "set_attn_implementation('sdpa')")
    base = model.base_model
    plain = base is not model and router.causal and isinstance(base, nn.Module)
    require(plain, "graphs", "a causal language model with a head", type(model).__name__, fix)
    layers = StaticCache(config=model.config.get_text_config(), max_cache_len=2).layers
    plain = all(type(layer) is StaticLayer for layer in layers)
    require(plain, "graphs", "attention over all keys in every layer", type(model).__name__, fix)
    undo = [replace_forward(base, forward)]
    settings = getattr(model, "generation_config", None)
    if settings is not None:  # torch.compile would take a step before a replay could
        undo.append(partial(setattr, settings, "disable_compile", settings.disable_compile))
        settings.disable_compile = True
    return undo


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stack's own pass, or a replay of it."""
    own: Callable[..., Any] = partial(type(self).forward, self)
    replay = None if torch.compiler.is_compiling() else self.__dict__.get(REPLAY)
    return own(*args, **kwargs) if replay is None else replay(self, own, args, kwargs)


def forget(base: nn.Module) -> None:
    """Let a stack have no replay, as that of a copied model never had one."""
    base.__dict__.pop(REPLAY, None)


class LentKeys:
    """Graphs, and the keys that they are of."""

    def __init__(self, graphs: Graphs, cache: Any):
        self.graphs = graphs
        self.of = None if cache is None else weakref.ref(cache)

    def holds(self, cache: Any) -> bool:
        """Whether a cache has these keys."""
        mine, its = self.graphs.cache.layers[0], cache.layers[0]
        return bool(mine.is_initialized) and mine.keys.data_ptr() == its.keys.data_ptr()

    def fits(self, asked: Replayable) -> bool:
        """Whether a prompt can be read into these keys, which nobody else has."""
        free = self.of is None or self.of() is None
        same = self.graphs.batch == len(asked.tokens)
        if not isinstance(asked.cache, StaticCache):
            return same and self.of is None and self.graphs.capacity >= asked.tokens.shape[1]
        of_its_size = self.graphs.capacity == asked.cache.layers[0].max_cache_len
        return same and free and self.of is not None and of_its_size

    def lend(self, cache: StaticCache) -> None:
        """Give the cache of a prompt these keys."""
        share(self.graphs.cache, cache)
        self.of = weakref.ref(cache)


def share(cache: Any, to: Any) -> None:
    """Let a static cache have the tensors of another."""
    for mine, its in zip(cache.layers, to.layers, strict=True):
        its.__dict__.update(mine.__dict__)


class Replay:
    """What was captured of one patched model. Threads take turns; no copy or pickle has it."""

    def __init__(self, router: RoutedLanguage):
        self.undo, self.router = switch_on(router), weakref.ref(router)
        base: Any = router.model.base_model
        setattr(base, REPLAY, self)
        self.undo.append(partial(forget, base))
        self._stores: list[LentKeys] = []
        self._turn, self._here = threading.RLock(), threading.local()
        self._state: Any = None
        self._held: list[Tensor] = []  # what the graphs read, of nobody else's by now
        self._stands: Any = None
        self._hooked: str | None = None  # why the last call was not replayed, if hooks were
        self._parts: Parts | None = None
        self._seen: Any = None  # the cache whose steps are known to be of this state

    def __reduce__(self) -> Any:
        return nothing, ()

    def __call__(
        self, base: nn.Module, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """One call of the stack."""
        router = self.router()
        other = router is None or router.replay is not self
        if other or getattr(self._here, "captures", False) or captured_elsewhere():
            return own(*args, **kwargs)
        assert router is not None
        self._parts = self._parts or Parts(base, router.controller)
        why: str = MOVED
        while why == MOVED:
            asked = read(router, base, args, kwargs)
            if isinstance(asked, str):
                why = asked
                break
            with self._turn:
                found = self._replayed(router, base, own, asked)
            if not isinstance(found, str):
                return found
            why = found
        self._seen = None
        out = own(*args, **kwargs)
        router.last.as_called = why
        return out

    def _replayed(
        self, router: RoutedLanguage, base: nn.Module, own: Callable[..., Any], asked: Replayable
    ) -> BaseModelOutputWithPast | str:
        """What a replay answers, or why it cannot.

        While the device reads a prompt into memory of nobody else's, the host looks whether modules
        and weights are as they were; if not, nobody sees what was read. Elsewhere it looks before.
        """
        self._here.captures = True
        try:
            stands = router.policy, router.full_up_to
            if stands != self._stands:
                self._stores.clear()
                self._stands = stands
            room, free = self._room(asked), asked.first and not isinstance(asked.cache, StaticCache)
            known = next((s for s in self._stores if free and s.fits(asked)), None)
            ready = known is not None and known.graphs.captured(room)
            meanwhile = ready and not self._hooked  # else each call would be read twice
            why = None if meanwhile else self._changed(router, base, asked)
            if why is None:
                store = self._store(base, own, asked)
                graphs = store.graphs
                found = (graphs.prefill(asked.tokens, room) if asked.first
                         else graphs.append(asked.tokens, **asked.inputs))  # fmt: skip
                why = self._changed(router, base, asked, meanwhile) if meanwhile else None
            return why or self._copied(router, base, store, asked, found)
        finally:
            self._here.captures = False

    def _changed(
        self, router: RoutedLanguage, base: nn.Module, asked: Replayable, read: bool = False
    ) -> str | None:
        """Why what was captured, or `read` by it, does not stand for the modules any more."""
        assert self._parts is not None
        if not self._parts.same(router.controller):
            self._parts, self._state, self._seen = Parts(base, router.controller), None, None
            return MOVED
        if self._renewed(asked) and read:
            return MOVED
        self._hooked = self._parts.hooked()
        return self._hooked

    @staticmethod
    def _copied(
        router: RoutedLanguage, base: Any, store: LentKeys, asked: Replayable,
        found: tuple[Tensor, Pass],
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """What a replay left, before the next writes over it."""
        (hidden, note), T, cache = found, asked.tokens.shape[1], asked.cache
        if cache is GROWING:  # made behind the launch, for it takes the host longer
            cache = DynamicCache(config=base.config.get_text_config())
        if asked.first and isinstance(cache, StaticCache):
            store.lend(cache)
        elif asked.first and cache is not None:
            fill(cache, store.graphs.keys, T)
        router.here.slot.last = cut(note, T)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[:, :T].clone(), past_key_values=cache
        )

    def _renewed(self, asked: Replayable) -> bool:
        """Whether weights have moved, or others came; what was captured of them is forgotten.

        The old ones are held until then: a graph that still reads them must find them.
        """
        if not asked.first and self._seen is not None and self._seen() is asked.cache:
            return False
        assert self._parts is not None
        state = self._parts.state()
        moved = state != self._state
        if moved:
            self._stores.clear()
            self._state, self._held = state, self._parts.weights()
        self._seen = weakref.ref(asked.cache) if isinstance(asked.cache, StaticCache) else None
        return moved

    def _store(self, base: nn.Module, own: Callable[..., Any], asked: Replayable) -> LentKeys:
        cache, known = asked.cache, isinstance(asked.cache, StaticCache)
        begun = known and cache.layers[0].is_initialized
        test = LentKeys.holds if begun else LentKeys.fits
        found = next((s for s in self._stores if test(s, cache if begun else asked)), None)
        if found is None:
            T = asked.tokens.shape[1]
            room = cache.layers[0].max_cache_len if known else bucketed(T)
            call = partial(one_pass, self.router, own)
            graphs = Graphs(base, room, len(asked.tokens), call=call, stored=known)
            found = LentKeys(graphs, cache if known else None)
            if begun:
                share(cache, graphs.cache)
        else:
            self._stores.remove(found)
        self._stores = [*self._stores, found][-STORES:]
        return found

    def _room(self, asked: Replayable) -> int:
        """The tokens that a prompt is padded to."""
        router, T = self.router(), asked.tokens.shape[1]
        assert router is not None
        room = bucketed(T)
        # what is left to `full` is not routed for its padding
        return router.full_up_to if T <= router.full_up_to < room else room


def captured_elsewhere() -> bool:
    """Whether somebody captures a graph of their own around this call."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def fill(cache: Any, keys: Keys, T: int) -> None:
    """Put copies of the first T keys of each layer into an empty cache, all by one launch."""
    read = [x[:, :, :T] for pair in keys for x in pair]
    copies = [torch.empty_like(x) for x in read]
    torch._foreach_copy_(copies, read)
    for index in range(len(keys)):
        if len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        Read.update(cache.layers[index], *copies[2 * index : 2 * index + 2])


def nothing() -> None:
    """What a copy of a `Replay` is: the copy of its model has the setting off."""


def bucketed(T: int) -> int:
    """The length that T tokens are padded to: at most an eighth more, or a multiple of LEAST."""
    size = max(LEAST, 1 << max((T - 1).bit_length() - 4, 0))
    return -(-T // size) * size


def cut(of: Pass, T: int) -> Pass:
    """A pass without the padding behind its first T tokens."""
    numbers = {layer: x[:, :T] for layer, x in of.concentration.items()}
    executed = {layer: x[:, :T] for layer, x in of.executed.items()}
    real: dict[int, Tensor | None] = dict.fromkeys(of.real)
    return Pass(numbers, executed, real, on_full=set(of.on_full), replayed=True)


def one_pass(
    router: "weakref.ref[RoutedLanguage]", own: Any, tokens: Tensor, cache: Any, last: Any,
    **inputs: Tensor,
) -> tuple[Tensor, Pass]:  # fmt: skip
    """What is captured: the stack's hidden states, and how it routed. Nothing of `Replay` is held,
    else keys would wait for the cyclic collector.
    """
    out = own(input_ids=tokens, past_key_values=cache, use_cache=True, **inputs)
    more = [name for name in list(out) if name not in ANSWERED]
    require(not more, "graphs", "a stack that answers hidden states alone", more)
    routed = router()
    assert routed is not None
    return out.last_hidden_state, routed.last
