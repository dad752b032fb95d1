"""One attention call of a patched model, as its own layer made it.

Queries, keys, values, mask and kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayes_router.integrations.calls.masks import real_queries, seen, seen_by_one
from bayes_router.integrations.calls.memory import LayerMemory

OwnAttention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(q [B, H, n, Dh], k and v [B, Hkv, m, Dh], mask) -> [B, H, n, Dv], with the layer's own scale,
soft cap and sinks."""


@dataclass(frozen=True)
class AttentionCall:
    """What a layer attends on, after its projections, its positions and its KV cache.

    The queries are the last of the keys.

    Attributes:
        q: [B, H, Tq, Dh].
        k: [B, Hkv, Tk, Dh].
        v: [B, Hkv, Tk, Dv].
        mask: as the layer's own kernel takes it: bool (True is seen) or added to the scores, [B or
            1, H or 1, Tq, Tk];
            None: causal, or everything where the layer is not causal.
        causal: nothing after a query's own position is seen.
        kernel: the layer's own attention.
        scaling: of the scores.
        plain: the kernel is softmax(scaling q k^T) v and nothing else.
        padding: [B, Tk] bool, True on real keys, where the mask says no more than that (and
            causality); else None.
        memory: what decoding remembers of this layer beside the cache that the keys come from;
            None: nothing.
        held: of one new token before a static cache on a GPU, whose length no host knows: how many
            tokens stand there, the new one among them; an integer [] on the device. Keys, values
            and mask have all slots. None: no such call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    kernel: OwnAttention
    scaling: float
    plain: bool = False
    padding: Tensor | None = None
    memory: LayerMemory | None = None
    held: Tensor | None = None

    @property
    def dense(self) -> bool:
        """Every query sees every key up to itself (or all of them): nothing is hidden."""
        return self.mask is None and (not self.causal or self.q.shape[2] == self.k.shape[2])

    def positions(self) -> tuple[Tensor, Tensor]:
        """Positions of the queries [Tq, 1] and of the keys [1, Tk]."""
        Tq, Tk = self.q.shape[2], self.k.shape[2]
        keys = torch.arange(Tk, device=self.q.device)
        return keys[Tk - Tq :, None], keys[None]

    def visible(self) -> Tensor:
        """Which keys each query sees, bool, broadcastable to [B, H, Tq, Tk]."""
        if self.mask is None:
            query, key = self.positions()
            return (key <= query if self.causal else (key >= 0).expand(self.q.shape[2], -1))[
                None, None
            ]
        return seen(self.mask)

    def real_keys(self) -> tuple[bool, Tensor | None]:
        """(known, [B or 1, Tk] or None).

        The keys that count, where hidden ones are padding and no more.
        """
        if self.mask is None:
            return self.causal, None
        if self.q.shape[2] > 1:
            return self.causal and self.padding is not None, self.padding
        return seen_by_one(self.mask) if self.causal else (False, None)

    def real_queries(self) -> Tensor | None:
        """[B or 1, Tq] bool, False on padding, or None: every query is a token."""
        return (
            None
            if self.mask is None or self.held is not None
            else real_queries(self.mask, self.q.shape[2])
        )

    def rescaled(self) -> Tensor:
        """Queries for the kernels of `attention`, whatever the layer's own scale.

        The kernels divide scores by sqrt(Dh).
        """
        factor = self.scaling * self.q.shape[3] ** 0.5
        return self.q if abs(factor - 1) < 1e-6 else self.q * factor

    def batch(self, rows: Tensor) -> "AttentionCall":
        """The sequences `rows` [n] of the batch alone."""

        def pick(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 < len(self.q) else x.index_select(0, rows)

        q, k, v = (x.index_select(0, rows) for x in (self.q, self.k, self.v))
        return replace(
            self, q=q, k=k, v=v, mask=pick(self.mask), padding=pick(self.padding), memory=None
        )

    def part(self, rows: slice) -> "AttentionCall":
        """Neighbouring sequences of the batch alone, as views."""

        def pick(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 < len(self.q) else x[rows]

        q, k, v = self.q[rows], self.k[rows], self.v[rows]
        return replace(
            self, q=q, k=k, v=v, mask=pick(self.mask), padding=pick(self.padding), memory=None
        )

    def heads(self, queries: slice, keys: slice) -> "AttentionCall":
        """Some query heads and the key heads that they share alone, as views.

        For experts that know no head by name.
        """
        mask = self.mask if self.mask is None or self.mask.shape[1] == 1 else self.mask[:, queries]
        q, k, v = self.q[:, queries], self.k[:, keys], self.v[:, keys]
        return replace(self, q=q, k=k, v=v, mask=mask, memory=None)

    def explicit(self) -> "AttentionCall":
        """The same with its mask written out, so that queries may be taken out of their order."""
        return (
            self if self.mask is not None or not self.causal else replace(self, mask=self.visible())
        )
