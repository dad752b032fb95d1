"""Which keys a query sees: reading and narrowing the masks that models hand over."""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bayes_router.integrations.calls.tracing import exporting

Answer = TypeVar("Answer")


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
    """Keys within a window of W.

    The last W up to the query, or W around it, floor((W - 1) / 2) of them ahead.
    """
    if causal:
        return key > query - window
    return (key >= query - window // 2) & (key <= query + (window - 1) // 2)


def first_seen(visible: Tensor, count: int) -> Tensor:
    """The first `count` of the keys that each query sees."""
    return visible & (visible.int().cumsum(-1) <= count)


class OfLast(Generic[Answer]):
    """`read(...)`, but once while it is asked about the same tensors.

    All layers of a pass share one mask.

    On a GPU reading waits for the device. Tensors are told by identity and not kept alive.
    """

    def __init__(self, read: Callable[..., Answer]):
        self._read = read
        # one object: threads see a question with its answer
        self._last: tuple[tuple[Any, ...], Answer] | None = None

    def __call__(self, *asked: Any) -> Answer:
        """The answer to these arguments, tensors or what compares by value."""
        if exporting():
            return self._read(*asked)  # what is traced is not kept
        last = self._last
        if last is None or not all(map(_same, last[0], asked)):
            last = self._last = (
                tuple(weakref.ref(x) if isinstance(x, Tensor) else x for x in asked),
                self._read(*asked),
            )
        return last[1]


def _same(known: Any, asked: Any) -> bool:
    return known() is asked if isinstance(known, weakref.ref) else bool(known == asked)


def padding_of(mask: Tensor, num_queries: int, causal: bool) -> Tensor | None:
    """[B, Tk] real keys, if `mask` [B, 1, Tq, Tk] hides padding and nothing else.

    Where causal, the future too.
    """
    if (
        mask.dtype != torch.bool
        or mask.dim() != 4
        or mask.shape[1] != 1
        or mask.shape[2] != num_queries
    ):
        return None
    Tk = mask.shape[3]
    # the last query sees all that is real; a view would keep the whole mask
    real = mask[:, 0, -1].clone()
    key = torch.arange(Tk, device=mask.device)
    expected = real[:, None].expand(-1, num_queries, -1)
    if causal:
        expected = expected & (key <= key[Tk - num_queries :, None])
    return real if torch.equal(mask[:, 0], expected) else None


@OfLast
def seen_by_one(mask: Tensor) -> tuple[bool, Tensor | None]:
    """Whether a mask is the same for all heads, and the keys that the last query sees.

    The keys are [B or 1, Tk].
    """
    usable = mask.dim() == 4 and mask.shape[1] == 1
    return usable, seen(mask)[:, 0, -1] if usable else None


@OfLast
def real_queries(mask: Tensor, num_queries: int) -> Tensor:
    """[B or 1, Tq] bool, False on padding: a token sees itself, and no query sees padding.

    The queries are the last keys.
    """
    own = mask[(None,) * (4 - mask.dim())][..., mask.shape[-1] - num_queries :]
    # one row for all queries
    own = own.diagonal(dim1=-2, dim2=-1) if mask.shape[-2] == num_queries else own[..., -1, :]
    return seen(own).reshape(-1, *own.shape[-2:]).any(1)
