"""What decoding a patched model remembers beside the Hugging Face cache.

And how that grows without being copied.

The state of each linear expert is remembered, where it is valid.

A state summarises the first n cached keys. It is used only while the cache still holds the very
tensor of keys that the last call left there, grown by the new tokens alone, with the same keys
hidden. A cropped, reordered, copied or fresh cache, or one that hands out other tensors than it
keeps, gives an empty memory, and the state is made again from the cached keys and values:
correctness never depends on it.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayes_router.integrations.calls.masks import OfLast


@dataclass(frozen=True)
class Running:
    """sum_s phi(k_s) (v_s, 1)^T over the first `length` keys.

    [B, Hkv, F, Dv + 1], float32 at least.
    """

    state: Tensor
    length: int


class LayerMemory:
    """The states of one layer for one cache.

    Attributes:
        known: the keys that are hidden are padding and no more, the same for all heads: states may
            be used.
        real: [B or 1, Tk] bool, the keys that count; None: all.
        begins: nothing was held before the call under way.
        running: by class of expert.
        beside: [B, n], what a policy remembers of the texts; None: nothing, or no more.
    """

    def __init__(self) -> None:
        self.known, self.length, self.version = False, 0, 0
        self.real: Tensor | None = None
        self.running: dict[type, Running] = {}
        self.beside: Tensor | None = None
        self.begins = True
        self._keys: weakref.ref[Tensor] | None = None

    def follow(
        self, held: Tensor | None, keys: Tensor, num_queries: int, known: bool, real: Tensor | None
    ) -> None:
        """Take in a call over `keys` [B, Hkv, Tk, Dh], the last `num_queries` of them new.

        `held` is what the cache kept of this layer's keys before it; `known` and `real` say which
        keys count.
        """
        Tk, past = keys.shape[2], keys.shape[2] - num_queries
        same = (
            held is not None
            and self._keys is not None
            and self._keys() is held
            and version(held) == self.version
        )
        if not (
            same and known and self.known and self.length == past and unchanged(self.real, real)
        ):
            self.running.clear()
            self.beside = None
        self.begins = past == 0
        self.known, self.real, self.length = known, real, Tk
        self._keys, self.version = weakref.ref(keys), version(keys)


class Memories:
    """`LayerMemory` by cache and layer; what belongs to a cache goes with it."""

    def __init__(self) -> None:
        self._by_cache: weakref.WeakKeyDictionary[Any, dict[int, LayerMemory]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, cache: Any, index: int) -> LayerMemory:
        """The memory of a layer."""
        layers = self._by_cache.setdefault(cache, {})
        if index not in layers:
            layers[index] = LayerMemory()
        return layers[index]

    def __reduce__(self) -> Any:
        return Memories, ()  # a copied model has caches of its own


def version(x: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count."""
    return 0 if x.is_inference() else x._version


def unchanged(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether the same ones of the keys of before are real now.

    Waits for the device, once a pass, where there is padding.
    """
    return before is now if before is None or now is None else _begins_with(now, before)


@OfLast
def _begins_with(now: Tensor, before: Tensor) -> bool:
    fits = before.shape[0] == now.shape[0] and before.shape[1] <= now.shape[1]
    return fits and torch.equal(before, now[:, : before.shape[1]])
