"""One attention call of a patched model, as its own layer made it: queries, keys, values, mask and kernel."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayes_router.integrations.memory import LayerMemory

Answer = TypeVar("Answer")

Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(q [B, H, n, Dh], k and v [B, Hkv, m, Dh], mask) -> [B, H, n, Dv], with the layer's own scale, soft cap and sinks."""


@dataclass(frozen=True)
class AttentionCall:
    """What a layer attends on, after its projections, its positions and its KV cache. The queries are the last of the keys.

    Attributes:
        q: [B, H, Tq, Dh].
        k: [B, Hkv, Tk, Dh].
        v: [B, Hkv, Tk, Dv].
        mask: as the layer's own kernel takes it: bool (True is seen) or added to the scores, [B or 1, H or 1, Tq, Tk];
            None: causal, or everything where the layer is not causal.
        causal: nothing after a query's own position is seen.
        kernel: the layer's own attention.
        scaling: of the scores.
        plain: the kernel is softmax(scaling q k^T) v and nothing else.
        padding: [B, Tk] bool, True on real keys, where the mask says no more than that (and causality); else None.
        memory: what decoding remembers of this layer beside the cache that the keys come from; None: nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    kernel: Kernel
    scaling: float
    plain: bool = False
    padding: Tensor | None = None
    memory: "LayerMemory | None" = None

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
            return (key <= query if self.causal else (key >= 0).expand(self.q.shape[2], -1))[None, None]
        return seen(self.mask)

    def rescaled(self) -> Tensor:
        """Queries for the kernels of `attention`, which divide scores by sqrt(Dh), whatever the layer's own scale."""
        factor = self.scaling * self.q.shape[3] ** 0.5
        return self.q if abs(factor - 1) < 1e-6 else self.q * factor

    def batch(self, rows: Tensor) -> "AttentionCall":
        """The sequences `rows` [n] of the batch alone."""

        def pick(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 < len(self.q) else x.index_select(0, rows)

        q, k, v = (x.index_select(0, rows) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, mask=pick(self.mask), padding=pick(self.padding), memory=None)

    def part(self, rows: slice) -> "AttentionCall":
        """Neighbouring sequences of the batch alone, as views."""

        def pick(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 < len(self.q) else x[rows]

        q, k, v = self.q[rows], self.k[rows], self.v[rows]
        return replace(self, q=q, k=k, v=v, mask=pick(self.mask), padding=pick(self.padding), memory=None)

    def explicit(self) -> "AttentionCall":
        """The same with its mask written out, so that queries may be taken out of their order."""
        return self if self.mask is not None or not self.causal else replace(self, mask=self.visible())


def seen(mask: Tensor) -> Tensor:
    """A mask, bool or additive, as bool. The least finite number and -inf hide a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def restrict(mask: Tensor | None, allowed: Tensor) -> Tensor:
    """`mask` with the keys outside `allowed` (bool) hidden too."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def near(query: Tensor, key: Tensor, window: int, causal: bool) -> Tensor:
    """Keys within a window of W: the last W up to the query, or W around it, floor((W - 1) / 2) of them ahead."""
    if causal:
        return key > query - window
    return (key >= query - window // 2) & (key <= query + (window - 1) // 2)


def first_seen(visible: Tensor, count: int) -> Tensor:
    """The first `count` of the keys that each query sees."""
    return visible & (visible.int().cumsum(-1) <= count)


class OfLast(Generic[Answer]):
    """`read(...)`, but once while it is asked about the same tensors: all layers of a pass share one mask.

    On a GPU reading waits for the device. Tensors are told by identity and not kept alive.
    """

    def __init__(self, read: Callable[..., Answer]):
        self._read = read
        self._last: tuple[tuple[Any, ...], Answer] | None = None  # one object: threads see a question with its answer

    def __call__(self, *asked: Any) -> Answer:
        """The answer to these arguments, tensors or what compares by value."""
        last = self._last
        if last is None or not all(map(_same, last[0], asked)):
            last = self._last = tuple(weakref.ref(x) if isinstance(x, Tensor) else x for x in asked), self._read(*asked)
        return last[1]


def _same(known: Any, asked: Any) -> bool:
    return known() is asked if isinstance(known, weakref.ref) else bool(known == asked)


def padding_of(mask: Tensor, num_queries: int, causal: bool) -> Tensor | None:
    """[B, Tk] real keys, if `mask` [B, 1, Tq, Tk] hides padding (and, where causal, the future) and nothing else."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != num_queries:
        return None
    Tk = mask.shape[3]
    real = mask[:, 0, -1].clone()  # the last query sees all that is real; a view would keep the whole mask
    key = torch.arange(Tk, device=mask.device)
    expected = real[:, None].expand(-1, num_queries, -1)
    if causal:
        expected = expected & (key <= key[Tk - num_queries :, None])
    return real if torch.equal(mask[:, 0], expected) else None
