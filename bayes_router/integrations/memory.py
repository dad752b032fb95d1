"""What decoding a patched model remembers beside the Hugging Face cache: the state of each linear expert, where it is valid.

A state summarises the first n cached keys. It is used only while the cache still holds the very tensor of keys that the last
call left there, grown by the new tokens alone, with the same keys hidden. A cropped, reordered, copied or fresh cache, or one
that hands out other tensors than it keeps, gives an empty memory, and the state is made again from the cached keys and values:
correctness never depends on it.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayes_router.integrations.call import AttentionCall, seen


@dataclass(frozen=True)
class Running:
    """sum_s phi(k_s) (v_s, 1)^T over the first `length` keys: [B, Hkv, F, Dv + 1], float32."""

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
        return self._by_cache.setdefault(cache, {}).setdefault(index, LayerMemory())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Memories":
        return Memories()  # a copied model has caches of its own


def held_keys(cache: Any, layer: Any) -> Tensor | None:
    """The keys [B, Hkv, T, Dh] that a cache of transformers keeps for a layer; None where it keeps them otherwise."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None or not isinstance(layer, int) or not 0 <= layer < len(layers):
        return None
    keys = getattr(layers[layer], "keys", None)
    return keys if isinstance(keys, Tensor) else None


def version(x: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count."""
    return 0 if x.is_inference() else x._version


_last_real: tuple[Any, tuple[bool, Tensor | None]] = (lambda: None, (False, None))
_last_same: tuple[Any, Any, bool] = (lambda: None, lambda: None, False)


def real_keys(call: AttentionCall) -> tuple[bool, Tensor | None]:
    """(known, [B or 1, Tk] or None): see `LayerMemory`. All layers of a pass share one mask, which is read once."""
    global _last_real
    if call.mask is None:
        return call.causal, None
    if call.q.shape[2] > 1:
        return call.causal and call.padding is not None, call.padding
    if _last_real[0]() is not call.mask:
        usable = call.causal and call.mask.dim() == 4 and call.mask.shape[1] == 1
        _last_real = (weakref.ref(call.mask), (usable, seen(call.mask)[:, 0, -1] if usable else None))
    return _last_real[1]


def unchanged(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether the same ones of the keys of before are real now. Waits for the device, once a pass, where there is padding."""
    global _last_same
    if before is None or now is None:
        return before is now
    if _last_same[0]() is not before or _last_same[1]() is not now:
        fits = before.shape[0] == now.shape[0] and before.shape[1] <= now.shape[1]
        same = fits and torch.equal(before, now[:, : before.shape[1]])
        _last_same = (weakref.ref(before), weakref.ref(now), same)
    return _last_same[2]
