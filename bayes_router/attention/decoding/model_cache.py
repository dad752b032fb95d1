"""The caches of all layers of a model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.decoding.freed import FreedCache
from bayes_router.attention.experts.contract import Expert


class RoutedCache:
    """The caches of all layers, which hold the same tokens."""

    def __init__(self, layers: Sequence[LayerCache]):
        if not layers:
            raise ValueError("layers: expected at least one; got none")
        self.layers = tuple(layers)
        self.beside: dict[int, Tensor] = {}  # by layer, [B, n]: what a policy remembers of the rows

    def keep(self, layer: int, state: Tensor) -> None:
        """Remember `state` [B, n] beside a layer, where it was.

        A captured graph writes there again.
        """
        if layer in self.beside:
            self.beside[layer].copy_(state)
        else:
            self.beside[layer] = state.clone()

    @classmethod
    def build(
        cls,
        experts: Sequence[Sequence[Expert]],
        batch: int,
        capacity: int,
        num_kv_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        short: Sequence[Sequence[int]] = (),
    ) -> "RoutedCache":
        """An empty cache for `batch` sequences of at most `capacity` tokens.

        `experts` are those of each layer; `short` its key heads that keep their window alone, see
        `FreedCache`.
        """
        sizes, kind = (batch, capacity, num_kv_heads), {"device": device, "dtype": dtype}
        layers = [
            FreedCache(e, *sizes, heads, **kind) if heads else LayerCache(e, *sizes, **kind)  # type: ignore[arg-type]
            for e, heads in zip(experts, short or [()] * len(experts), strict=True)
        ]
        return cls(layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    @property
    def lengths(self) -> Tensor:
        """[B] tokens that every layer holds.

        The position of each row's next token, also while a pass is under way.
        """
        return self.layers[-1].lengths

    @property
    def capacity(self) -> int:
        """Tokens that a row may hold."""
        return self.layers[0].capacity

    @property
    def bytes(self) -> int:
        """Size of everything held."""
        return sum(layer.bytes for layer in self.layers)

    def reset(self) -> None:
        """Forget every token."""
        for layer in self.layers:
            layer.reset()
        self.beside.clear()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was (beam search); index int64 [B]."""
        for layer in self.layers:
            layer.reorder(index)
        for state in self.beside.values():
            state.copy_(state.index_select(0, index))
