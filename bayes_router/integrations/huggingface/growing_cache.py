"""The Hugging Face cache that grows in place."""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.integrations.calls.tracing import exporting


def held_keys(cache: Any, layer: Any) -> Tensor | None:
    """The keys [B, Hkv, T, Dh] that a cache of transformers keeps for a layer.

    None where it keeps them otherwise.

    The layer's next keys are appended in place, where it concatenates: see `grow`.
    """
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None or not isinstance(layer, int) or not 0 <= layer < len(layers):
        return None
    one, plain = (
        layers[layer],
        getattr(sys.modules.get("transformers.cache_utils"), "DynamicLayer", None),
    )
    if plain is not None and type(one) is plain:
        grow(one)
    keys = getattr(one, "keys", None)
    return keys if isinstance(keys, Tensor) else None


def empty(cache: Any, layer: Any) -> bool:
    """Whether a layer's call sees its own tokens alone: there is no cache, or a growing one that
    has none of this layer's yet.
    """
    if cache is None:
        return True
    layers = getattr(cache, "layers", None)
    if layers is None or not isinstance(layer, int) or not 0 <= layer < len(layers):
        return False
    plain = getattr(sys.modules.get("transformers.cache_utils"), "DynamicLayer", None)
    return type(layers[layer]) is plain and not layers[layer].is_initialized


def filled_slots(cache: Any, layer: Any) -> int:
    """Tokens that a static cache of transformers holds for a layer.

    On a GPU this waits for the device.

    Raises:
        ValueError: it is read where there are no values yet, or it does not say.
    """
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    known = isinstance(layer, int) and 0 <= layer < len(layers or ())
    require(
        known and not exporting(),
        "past_key_values",
        "a cache that grows with the text",
        type(cache).__name__
        + (" in torch.export" if known else ", which does not say what it holds of this layer"),
        "leave cache_implementation unset, or unpatch() first",
    )
    one: Any = layers[layer] if layers else None
    return int(one.get_seq_length())


def counter_of(cache: Any, layer: Any) -> Tensor | None:
    """The integer [] in which a static layer of a cache counts its tokens, in place.

    None where it has none yet.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or not isinstance(layer, int) or not 0 <= layer < len(layers):
        return None
    one = layers[layer]
    static = getattr(sys.modules.get("transformers.cache_utils"), "StaticLayer", None)
    if static is None or type(one) is not static or not one.is_initialized:
        return None
    counter: Any = one.cumulative_length
    return counter if isinstance(counter, Tensor) else None


SPARE = 8  # a store has room for another eighth of what it holds, and for
LEAST = 64  # tokens at least


class _Room:
    """What the last step of a layer left, and the longer tensors behind it.

    No copy or pickle takes it along.
    """

    def __init__(self) -> None:
        self.left: tuple[Tensor, Tensor] | None = None
        self.store: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> Any:
        return _Room, ()


def grow(layer: Any) -> None:
    """Let this one layer of a cache append in place where it concatenates.

    A step copies its own keys and no others.

    Its class stays; the object gets an `update` of its own, which copies and pickles with it.
    `keys` and `values` become views of a store that is longer. What they show never changes:
    tokens are only written behind it, and only behind the very tensors that the last step left.
    After anything else (a crop, a reordering, a copy) and where autograd looks on, the layer
    concatenates as before.
    """
    known = layer.__dict__.get("update")
    # a shallow copy has another's
    if not (isinstance(known, _Append) and known.layer() is layer):
        layer.update = _Append(layer)


class _Append:
    """`DynamicLayer.update` of one layer, which it does not keep alive: no cycle holds a cache."""

    def __init__(self, layer: Any):
        self.layer = weakref.ref(layer)
        self.room = _Room()

    def __reduce__(self) -> Any:
        return _Append, (self.layer(),)

    def __call__(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layer()
        room = self.room
        left: tuple[Tensor, Tensor]
        if not _untouched(layer, room, key_states, value_states):
            room.store, left = (
                None,
                type(layer).update(layer, key_states, value_states, *args, **kwargs),
            )
        else:
            start = layer.keys.shape[2]
            stop = start + key_states.shape[2]
            if room.store is None or room.store[0].shape[2] < stop:
                length = stop + max(stop // SPARE, LEAST)
                room.store = _longer(layer.keys, length), _longer(layer.values, length)
            for store, new in zip(room.store, (key_states, value_states), strict=True):
                # `data`: earlier views show what they showed, and keep their version
                store.data[:, :, start:stop] = new
            left = room.store[0][:, :, :stop], room.store[1][:, :, :stop]
        room.left = layer.keys, layer.values = left
        return left


def _untouched(layer: Any, room: _Room, *new: Tensor) -> bool:
    """Whether a layer holds what its last step left, and the new tokens are of that kind."""
    if room.left is None or layer.keys is not room.left[0] or layer.values is not room.left[1]:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*room.left, *new)):
        return False
    return all(
        x.shape[:2] == y.shape[:2]
        and x.shape[3:] == y.shape[3:]
        and x.dtype == y.dtype
        and x.device == y.device
        for x, y in zip(room.left, new, strict=True)
    )


def _longer(x: Tensor, length: int) -> Tensor:
    """A store [B, H, length, D] that begins with x.

    A usual tensor, though inference mode makes it.
    """
    with torch.inference_mode(False):
        store = x.new_empty(*x.shape[:2], length, x.shape[3])
    store.data[:, :, : x.shape[2]] = x
    return store
