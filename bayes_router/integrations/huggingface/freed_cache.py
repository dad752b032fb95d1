"""A layer of the Hugging Face cache in which some key heads keep their sinks and window alone."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bayes_router.checks import require
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.masks import restrict
from bayes_router.integrations.huggingface.growing_cache import grow


class Heads(NamedTuple):
    """How the key heads of a layer are kept."""

    whole: list[int]  # all their keys
    short: list[int]  # sinks and window
    sinks: int
    window: int


class FreedLayer(DynamicLayer):
    """What `DynamicLayer` held, without the keys that its `short` heads never read again.

    `keys` and `values` are those of the other heads, [B, whole, T, Dh]; the short ones lie in
    `near`, keys and values [B, short, sinks + window - 1, Dh]. `update` answers with the former,
    and keeps in `reading` what the short heads attend on until `taken`.
    """

    is_croppable = False

    def __init__(self, layer: DynamicLayer, heads: Heads):
        self.heads, self.rest = heads, DynamicLayer()
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        self.rest.lazy_initialization(keys, values)
        self.rest.keys, self.rest.values = (x[:, heads.whole].contiguous() for x in (keys, values))
        grow(self.rest)
        self.near = self._near(keys[:, heads.short]), self._near(values[:, heads.short])
        self.reading: tuple[Tensor, Tensor] | None = None
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device

    @property
    def keys(self) -> Tensor:
        """The keys of the heads that keep all, [B, whole, T, Dh]."""
        kept = self.rest.keys
        assert kept is not None
        return kept

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self.rest.keys = keys

    @property
    def values(self) -> Tensor:
        """The values of the heads that keep all."""
        kept = self.rest.values
        assert kept is not None
        return kept

    @values.setter
    def values(self, values: Tensor) -> None:
        self.rest.values = values

    def _near(self, x: Tensor) -> Tensor:
        sinks, last = self.heads.sinks, x.shape[2] - (self.heads.window - 1)
        return torch.cat([x[:, :, :sinks], x[:, :, max(last, sinks) :]], 2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer.update`; of the heads that keep all."""
        new = key_states[:, self.heads.short], value_states[:, self.heads.short]
        k, v = (torch.cat([x, y], 2) for x, y in zip(self.near, new, strict=True))
        self.reading, self.near = (k, v), (self._near(k), self._near(v))
        whole = self.heads.whole
        return self.rest.update(key_states[:, whole], value_states[:, whole], *args, **kwargs)

    def get_seq_length(self) -> int:
        """Tokens read, also where no head keeps them all."""
        return self.keys.shape[2]

    def taken(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the short heads of the call under way attend on, given once."""
        reading, self.reading = self.reading, None
        assert reading is not None
        return reading

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See `DynamicLayer.reorder_cache`."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `DynamicLayer.batch_repeat_interleave`."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `DynamicLayer.batch_select_indices`."""
        self._each(lambda x: x[indices])

    def _each(self, change: Any) -> None:
        self.keys, self.values = change(self.keys), change(self.values)
        self.near = change(self.near[0]), change(self.near[1])

    def crop(self, max_length: int) -> None:
        """Refused where tokens would go: the keys before the window are no more.

        Raises:
            ValueError: it would drop tokens.
        """
        length = self.get_seq_length()
        kept = max_length if max_length >= 0 else length + max_length
        require(
            kept >= length,
            "past_key_values",
            "a cache that is not cropped where freezing freed it",
            f"crop({max_length}) of {length} tokens",
            "router.thaw() before the text is read",
        )

    def offload(self) -> None:
        """See `CacheLayerMixin.offload`."""
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """See `CacheLayerMixin.prefetch`."""
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def attend_short(self, call: AttentionCall) -> Tensor:
        """The query heads of the short key heads: [B, n, Tq, Dv] under the layer's own kernel."""
        k, v = self.taken()
        sinks, total, Tq = self.heads.sinks, self.get_seq_length(), call.q.shape[2]
        at = torch.arange(total, device=k.device)
        key = torch.cat([at[:sinks], at[total - (k.shape[2] - sinks) :]])
        query = at[total - Tq :, None]
        allowed = (key <= query) & ((key > query - self.heads.window) | (key < sinks))  # [Tq, Tk]
        mask = allowed[None, None] if call.mask is None else restrict(call.mask[..., key], allowed)
        return call.kernel(call.q, k, v, mask)


def freed(cache: Any, layer: Any) -> FreedLayer | None:
    """The layer of a cache where it was freed."""
    layers = getattr(cache, "layers", None)
    one = (
        layers[layer]
        if layers is not None and isinstance(layer, int) and layer < len(layers)
        else None
    )
    return one if isinstance(one, FreedLayer) else None


def free(cache: Any, layer: Any, heads: Heads, call: AttentionCall) -> None:
    """Drop what the short heads of a layer read no more.

    Once a text is longer than sinks and window.

    Nothing is dropped of padded texts, whose sinks lie elsewhere in each row, of a layer that
    slides or is static already, nor where autograd looks on.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or not isinstance(layer, int) or not 0 <= layer < len(layers):
        return
    plain = type(layers[layer]) is DynamicLayer and call.causal and call.plain and call.mask is None
    if plain and call.k.shape[2] > heads.sinks + heads.window and not torch.is_grad_enabled():
        layers[layer] = FreedLayer(layers[layer], heads)


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache of transformers holds, of the tensors that are there.

    Room to grow is included.
    """
    total = 0
    for layer in cache.layers:
        own = (getattr(layer, name, None) for name in ("keys", "values"))
        held = [*own, *getattr(layer, "near", ())]
        total += sum(x.untyped_storage().nbytes() for x in held if isinstance(x, Tensor))
    return total


def attend_freed(layer: FreedLayer, call: AttentionCall, live: Any) -> Tensor:
    """[B, H, Tq, Dv] of a call whose keys are those that `layer` keeps whole.

    `live(call, query heads)` answers for them.
    """
    H, heads = call.q.shape[1], layer.heads
    group = H // (len(heads.whole) + len(heads.short))
    out = call.v.new_empty(len(call.q), H, call.q.shape[2], call.v.shape[3])
    for kept, answer in ((heads.short, layer.attend_short), (heads.whole, live)):
        queries = [head * group + i for head in kept for i in range(group)]
        if queries:
            mask = call.mask
            if mask is not None and mask.shape[1] > 1:
                mask = mask[:, queries]
            out[:, queries] = answer(replace(call, q=call.q[:, queries], mask=mask, memory=None))
    return out
