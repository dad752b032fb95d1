"""What an attention expert is, and the registry by which a configuration names one.

All experts of a layer share queries, keys, values and the output projection; an expert owns only
what is its own.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayes_router.attention.shapes import ExpertShape, segments
from bayes_router.checks import unknown


class Kernel(Enum):
    """Which of the library's kernels computes what an expert's `forward` does."""

    FULL = "full"  # softmax over all keys
    LOCAL = "local"  # softmax over the last `shape.window` keys and the first `shape.sinks`
    LINEAR = "linear"  # elu + 1, nothing fades
    GATED = "gated"  # features and log gates that the expert computes (a `GatedLinearAttention`)
    NONE = "none"  # the expert alone knows

    @property
    def softmax(self) -> bool:
        """Whether it is softmax over some of the keys."""
        return self in (Kernel.FULL, Kernel.LOCAL)

    @property
    def sums(self) -> bool:
        """Whether the past is a sum, which may fade."""
        return self in (Kernel.LINEAR, Kernel.GATED)

    @property
    def plain(self) -> bool:
        """Whether it takes queries, keys and values as they are: the expert owns no tensors."""
        return self in (Kernel.FULL, Kernel.LOCAL, Kernel.LINEAR)


class Expert(nn.Module):
    """A causal attention mechanism over shared queries, keys and values.

    A subclass defines `forward` and is registered by `@register_expert("name")`. Class attributes
    describe it:

    rotary: it takes queries and keys with rotary positions applied (else the plain ones).
    stateful: it summarises its past in a state of constant size, and defines `init_state` and
        `extend_segment`. Otherwise decoding calls `forward` with the new queries and all cached
        keys.
    kernel: which of the library's kernels computes the same. It is not inherited: a class whose own
        body does not name one has none, so that a subclass which computes something else is never
        computed by its parent's kernel.

    `cost_ratio` is its cost relative to full attention in the paper's units, and `flops_per_token`
    its arithmetic.
    """

    name: ClassVar[str] = ""
    kernel: ClassVar[Kernel] = Kernel.NONE
    rotary: ClassVar[bool] = True
    stateful: ClassVar[bool] = False
    cost_ratio: ClassVar[float] = 1.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kernel = cls.__dict__.get("kernel", Kernel.NONE)

    def __init__(self, shape: ExpertShape):
        super().__init__()
        self.shape = shape

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: q [B, H, Tq, Dh], k, v [B, Hkv, Tk, Dh] -> [B, H, Tq, Dh].

        The queries are the last Tq of Tk positions.
        """
        raise NotImplementedError

    def flops_per_token(self, context: int) -> float:
        """FLOPs per token of a causal pass over `context` tokens, all heads.

        A multiply-add counts as two.
        """
        raise NotImplementedError

    def query_flops(self) -> float:
        """Of `flops_per_token`, what is done to a token's queries before they read a state.

        All heads of a stateful expert.
        """
        return 0.0

    def reach(self, num_keys: int) -> int | None:
        """Of `num_keys` keys, how many back a query sees, its own included.

        None where it is not simply the last so many.

        Read only of an expert whose `kernel` is a softmax.
        """
        return None

    def keys_read(self, context: int) -> int:
        """Cached keys that a decoding step reads at this context.

        An expert that keeps a state reads none.
        """
        return 0 if self.stateful else context

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        """As `forward`, but only rows with `chosen` [B, Tq] bool need be right.

        Override it to offer a kernel of your own.

        The dispatcher calls it for experts that its kernels do not compute; the default computes
        every row.
        """
        out: Tensor = self(q, k, v)
        return out

    def attend_units(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        """As `attend_rows`, with `chosen` [B, Tq, R].

        Of unit r (H / R neighbouring query heads) only its own rows count.

        The default computes all heads of a row that any unit chose.
        """
        return self.attend_rows(q, k, v, chosen.any(-1))

    def init_state(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The state before the first token, for inputs of these shapes."""
        raise NotImplementedError(f"expert {self.name!r} keeps no state")

    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Attend over what `state` holds and then the new tokens.

        q, k, v of the new tokens only -> (output, new state).
        """
        parts = []
        for a, b in segments(q.shape[2], q.device):
            out, state = self.extend_segment(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state)
            parts.append(out)
        return (torch.cat(parts, 2) if parts else torch.zeros_like(q)), state

    def extend_segment(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`extend` for at least one new token, and on a CPU for at most `SEGMENT`.

        What a stateful expert defines.
        """
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
            raise ValueError(
                f"register_expert: {name!r} is already {known.__module__}.{known.__qualname__}; "
                f"take another name"
            )
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
