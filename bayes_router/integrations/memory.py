"""What decoding a patched model remembers beside the Hugging Face cache, and how that grows without being copied.

The state of each linear expert is remembered, where it is valid.

A state summarises the first n cached keys. It is used only while the cache still holds the very tensor of keys that the last
call left there, grown by the new tokens alone, with the same keys hidden. A cropped, reordered, copied or fresh cache, or one
that hands out other tensors than it keeps, gives an empty memory, and the state is made again from the cached keys and values:
correctness never depends on it.
"""

import sys
import weakref
from dataclasses import dataclass
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor

from bayes_router.integrations.call import AttentionCall, OfLast, seen


@dataclass(frozen=True)
class Running:
    """sum_s phi(k_s) (v_s, 1)^T over the first `length` keys: [B, Hkv, F, Dv + 1], float32 at least."""

    state: Tensor
    length: int


class LayerMemory:
    """The states of one layer for one cache.

    Attributes:
        known: the keys that are hidden are padding and no more, the same for all heads: states may be used.
        real: [B or 1, Tk] bool, the keys that count; None: all.
        running: by class of expert.
    """

    def __init__(self) -> None:
        self.known, self.length, self.version = False, 0, 0
        self.real: Tensor | None = None
        self.running: dict[type, Running] = {}
        self._keys: weakref.ref[Tensor] | None = None

    def follow(self, held: Tensor | None, call: AttentionCall) -> None:
        """Take in a call; `held` is what the cache kept of this layer's keys before it."""
        Tk, past = call.k.shape[2], call.k.shape[2] - call.q.shape[2]
        same = held is not None and self._keys is not None and self._keys() is held and version(held) == self.version
        known, real = real_keys(call)
        if not (same and known and self.known and self.length == past and unchanged(self.real, real)):
            self.running.clear()
        self.known, self.real, self.length = known, real, Tk
        self._keys, self.version = weakref.ref(call.k), version(call.k)


class Memories:
    """`LayerMemory` by cache and layer; what belongs to a cache goes with it."""

    def __init__(self) -> None:
        self._by_cache: weakref.WeakKeyDictionary[Any, dict[int, LayerMemory]] = weakref.WeakKeyDictionary()

    def of(self, cache: Any, index: int) -> LayerMemory:
        """The memory of a layer."""
        layers = self._by_cache.setdefault(cache, {})
        if index not in layers:
            layers[index] = LayerMemory()
        return layers[index]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Memories":
        return Memories()  # a copied model has caches of its own


def held_keys(cache: Any, layer: Any) -> Tensor | None:
    """The keys [B, Hkv, T, Dh] that a cache of transformers keeps for a layer; None where it keeps them otherwise.

    The layer's next keys are appended in place, where it concatenates: see `growing`.
    """
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None or not isinstance(layer, int) or not 0 <= layer < len(layers):
        return None
    one, plain = layers[layer], getattr(sys.modules.get("transformers.cache_utils"), "DynamicLayer", None)
    if plain is not None and one.__class__ is plain:
        one.__class__ = growing(plain)
    keys = getattr(one, "keys", None)
    return keys if isinstance(keys, Tensor) else None


SPARE = 8  # a store has room for another eighth of what it holds, and for
LEAST = 64  # tokens at least


@remembered
def growing(kind: Any) -> Any:
    """`kind` of a cache's layer, made to append in place where it concatenates: a step copies its own keys and no others.

    `keys` and `values` become views of a store that is longer. What they show never changes: tokens are only written behind
    it, and only behind the very tensors that the last step left. After anything else (a crop, a reordering, a copy) and
    where autograd looks on, the layer concatenates as before.
    """
    own = {"update": _append, "__reduce__": _reduced, "_left": None, "_store": None}
    return type(f"Growing{kind.__name__}", (kind,), own | {"_layer_type": None})  # in no register of transformers


def _append(layer: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`DynamicLayer.update`."""
    left: tuple[Tensor, Tensor]
    kind: Any = type(layer).__base__
    if not _untouched(layer, key_states, value_states):
        layer._store, left = None, kind.update(layer, key_states, value_states, *args, **kwargs)
    else:
        start = layer.keys.shape[2]
        stop = start + key_states.shape[2]
        if layer._store is None or layer._store[0].shape[2] < stop:
            length = stop + max(stop // SPARE, LEAST)
            layer._store = _longer(layer.keys, length), _longer(layer.values, length)
        for store, new in zip(layer._store, (key_states, value_states), strict=True):
            store.data[:, :, start:stop] = new  # `data`: earlier views show what they showed, and keep their version
        left = layer._store[0][:, :, :stop], layer._store[1][:, :, :stop]
    layer._left = layer.keys, layer.values = left
    return left


def _untouched(layer: Any, *new: Tensor) -> bool:
    """Whether a layer holds what its last step left, and the new tokens are of that kind."""
    if layer._left is None or layer.keys is not layer._left[0] or layer.values is not layer._left[1]:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*layer._left, *new)):
        return False
    return all(
        x.shape[:2] == y.shape[:2] and x.shape[3:] == y.shape[3:] and x.dtype == y.dtype and x.device == y.device
        for x, y in zip(layer._left, new, strict=True)
    )


def _longer(x: Tensor, length: int) -> Tensor:
    """A store [B, H, length, D] that begins with x; a usual tensor, though inference mode makes it."""
    with torch.inference_mode(False):
        store = x.new_empty(*x.shape[:2], length, x.shape[3])
    store.data[:, :, : x.shape[2]] = x
    return store


def _reduced(layer: Any) -> Any:
    """Copied and pickled as the kind that it was, its keys and values without room behind them."""
    state = {name: value for name, value in layer.__dict__.items() if name not in ("_left", "_store")}
    state |= {name: state[name].clone() for name in ("keys", "values") if isinstance(state.get(name), Tensor)}
    return _plain, (type(layer).__base__, state)


def _plain(kind: Any, state: dict[str, Any]) -> Any:
    layer = kind.__new__(kind)
    layer.__dict__.update(state)
    return layer


def version(x: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count."""
    return 0 if x.is_inference() else x._version


def real_keys(call: AttentionCall) -> tuple[bool, Tensor | None]:
    """(known, [B or 1, Tk] or None): see `LayerMemory`."""
    if call.mask is None:
        return call.causal, None
    if call.q.shape[2] > 1:
        return call.causal and call.padding is not None, call.padding
    return _seen_by_one(call.mask) if call.causal else (False, None)


@OfLast
def _seen_by_one(mask: Tensor) -> tuple[bool, Tensor | None]:
    usable = mask.dim() == 4 and mask.shape[1] == 1
    return usable, seen(mask)[:, 0, -1] if usable else None


def unchanged(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether the same ones of the keys of before are real now. Waits for the device, once a pass, where there is padding."""
    return before is now if before is None or now is None else _begins_with(now, before)


@OfLast
def _begins_with(now: Tensor, before: Tensor) -> bool:
    fits = before.shape[0] == now.shape[0] and before.shape[1] <= now.shape[1]
    return fits and torch.equal(before, now[:, : before.shape[1]])
