"""What an attention expert is, and the registry by which a configuration names one.

All experts of a layer share queries, keys, values and the output projection; an expert owns only what is its own.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bayes_router.checks import unknown


class ExpertShape(NamedTuple):
    """What an expert may know when it is built."""

    num_heads: int
    head_dim: int
    window: int
    sinks: int = 0  # first keys that `local` never loses


class Expert(nn.Module):
    """A causal attention mechanism over shared queries, keys and values.

    A subclass defines `forward` and is registered by `@register_expert("name")`. Two class attributes describe it:

    rotary: it takes queries and keys with rotary positions applied (else the plain ones).
    stateful: it summarises its past in a state of constant size, and defines `init_state` and `extend_segment`. Otherwise
        decoding calls `forward` with the new queries and all cached keys.

    `cost_ratio` is its cost relative to full attention in the paper's units, and `flops_per_token` its arithmetic.
    """

    name: ClassVar[str] = ""
    rotary: ClassVar[bool] = True
    stateful: ClassVar[bool] = False
    cost_ratio: ClassVar[float] = 1.0

    def __init__(self, shape: ExpertShape):
        super().__init__()
        self.shape = shape

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: q [B, H, Tq, Dh], k, v [B, Hkv, Tk, Dh] -> [B, H, Tq, Dh]; the queries are the last Tq of Tk positions."""
        raise NotImplementedError

    def flops_per_token(self, context: int) -> float:
        """Multiply-adds counted as two, averaged over the tokens of a causal pass over `context` tokens, all heads."""
        raise NotImplementedError

    def query_flops(self) -> float:
        """Of `flops_per_token`, what a stateful expert does to a token's queries before they read its state, all heads."""
        return 0.0

    def keys_read(self, context: int) -> int:
        """Cached keys that a decoding step reads at this context; an expert that keeps a state reads none."""
        return 0 if self.stateful else context

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        """As `forward`, but only rows with `chosen` [B, Tq] bool need be right. Override it to offer a kernel of your own.

        The dispatcher calls it for experts other than the built-in ones; the default computes every row.
        """
        out: Tensor = self(q, k, v)
        return out

    def init_state(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The state before the first token, for inputs of these shapes."""
        raise NotImplementedError(f"expert {self.name!r} keeps no state")

    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Attend over what `state` holds and then the new tokens; q, k, v of the new tokens only -> (output, new state)."""
        parts = []
        for a, b in segments(q.shape[2], q.device):
            out, state = self.extend_segment(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state)
            parts.append(out)
        return (torch.cat(parts, 2) if parts else torch.zeros_like(q)), state

    def extend_segment(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """`extend` for at least one new token, and on a CPU for at most `SEGMENT`: what a stateful expert defines."""
        raise NotImplementedError(f"expert {self.name!r} keeps no state")


_REGISTRY: dict[str, type[Expert]] = {}


def register_expert(name: str) -> Callable[[type[Expert]], type[Expert]]:
    """Class decorator: configurations may name this expert from now on.

    Raises:
        ValueError: the name is taken by another class.
    """

    def register(cls: type[Expert]) -> type[Expert]:
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"register_expert: {name!r} is already {known.__module__}.{known.__qualname__}; take another name")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def expert_class(name: str) -> type[Expert]:
    """The class registered under `name`.

    Raises:
        ValueError: no such expert; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise unknown("expert", name, _REGISTRY)
    return _REGISTRY[name]


def expert_names() -> tuple[str, ...]:
    """Every registered expert."""
    return tuple(sorted(_REGISTRY))


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, Hkv, ...] -> [B, H, ...]: each key head serves H / Hkv consecutive query heads."""
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def widen(x: Tensor) -> Tensor:
    """At least float32: sums over the past are not kept in half precision."""
    return x if x.dtype == torch.float64 else x.float()


SEGMENT = 2048
"""Tokens that linear and local attention take at a time on a CPU: larger temporaries are paged in anew at every call."""


def segments(length: int, device: torch.device) -> list[tuple[int, int]]:
    """Bounds of the pieces in which `length` tokens are computed one after another: one piece, but for long text on a CPU."""
    size = SEGMENT if device.type == "cpu" else max(length, 1)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def merge_tokens(x: Tensor) -> Tensor:
    """[B, H, T, Dh] -> [B, T, H * Dh]."""
    return x.transpose(1, 2).flatten(2)


def check_tensor(name: str, x: object) -> None:
    """Raise a TypeError for anything but a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(x).__name__}; make one with torch.tensor")


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a ValueError that names the first of q, k, v whose shape, dtype or device does not fit the others."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, H, T, Dh]; got shape {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} like q; got {x.dtype} on {x.device}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected batch {q.shape[0]} and head_dim {q.shape[3]} like q; got shape {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected shape {tuple(k.shape)} like k; got {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides q's {q.shape[1]}; got {k.shape[1]}")
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"k: expected at least q's {q.shape[2]} positions; got {k.shape[2]}")


def causal_positions(num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the queries (the last of the keys') [Tq, 1] and of the keys [1, Tk]."""
    keys = torch.arange(num_keys, device=device)
    return keys[num_keys - num_queries :, None], keys[None]
