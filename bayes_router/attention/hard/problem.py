"""One hard-routed attention call, checked once, as every backend receives it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.shapes import ExpertShape, by_head, fits_units


@dataclass(frozen=True)
class RoutedProblem:
    """Query t of row b stands at position starts[b] + t and sees keys up to there.

    Unit r of its heads takes route[b, t, r].

    Attributes:
        q: [B, H, Tq, Dh], rotated.
        k: [B, Hkv, Tk, Dh], rotated.
        v: [B, Hkv, Tk, Dh].
        plain_q: as q, for experts that take no rotary positions.
        plain_k: as k, likewise.
        route: integer [B, Tq, R], indices into `experts`; each of the R units is H / R neighbouring
            query heads.
        experts: the mechanisms of this layer.
        lengths: [B] real queries of each row, the rest is right padding with output zero; None:
            all.
        starts: [B] position of the first query; None: Tk - Tq.
        elsewhere: indices of experts that the caller computes itself; their rows come out as zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plain_q: Tensor
    plain_k: Tensor
    route: Tensor
    experts: tuple[Expert, ...]
    lengths: Tensor | None = None
    starts: Tensor | None = None
    elsewhere: frozenset[int] = frozenset()

    @cached_property
    def needs_grad(self) -> bool:
        """Whether autograd records this call."""
        if not torch.is_grad_enabled():
            return False
        inputs = (self.q, self.k, self.v, self.plain_q, self.plain_k)
        return any(x.requires_grad for x in inputs) or any(
            p.requires_grad
            for expert in self.experts
            if not expert.kernel.plain
            for p in expert.parameters()
        )

    @property
    def units(self) -> int:
        """R, routing units of a token."""
        return self.route.shape[2]

    def chosen(self, *indices: int) -> Tensor:
        """Which query heads of which tokens took one of these experts: bool [B, H or 1, Tq, 1]."""
        found = self.route == indices[0]
        for index in indices[1:]:
            found |= self.route == index
        return by_head(found, self.q.shape[1])

    def computed(self) -> Iterator[tuple[int, Expert]]:
        """The experts that a backend has to compute, with their index."""
        return (
            (index, expert)
            for index, expert in enumerate(self.experts)
            if index not in self.elsewhere
        )

    @property
    def reads_one_pair(self) -> bool:
        """Whether all experts that are computed read the same queries and keys."""
        same = self.plain_q is self.q and self.plain_k is self.k
        return same or len({expert.rotary for _, expert in self.computed()}) < 2

    def inputs(self, expert: Expert) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as this expert takes them."""
        return (self.q, self.k, self.v) if expert.rotary else (self.plain_q, self.plain_k, self.v)

    def sequences(self) -> Iterator["RoutedProblem"]:
        """Each row of the batch alone, without padding and without keys that it cannot see.

        Synchronises on CUDA.
        """
        B, _, Tq, _ = self.q.shape
        if B == 1 and self.lengths is None and self.starts is None:
            yield self
            return
        lengths = [Tq] * B if self.lengths is None else self.lengths.tolist()
        starts = [self.k.shape[2] - Tq] * B if self.starts is None else self.starts.tolist()
        for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            row, queries, keys = slice(b, b + 1), slice(0, length), slice(0, start + length)
            yield replace(
                self,
                q=self.q[row, :, queries],
                plain_q=self.plain_q[row, :, queries],
                k=self.k[row, :, keys],
                v=self.v[row, :, keys],
                plain_k=self.plain_k[row, :, keys],
                route=self.route[row, queries],
                lengths=None,
                starts=None,
            )

    def real(self) -> Tensor | None:
        """[B, Tq] bool, False on padding; None without padding."""
        if self.lengths is None:
            return None
        return torch.arange(self.q.shape[2], device=self.q.device) < self.lengths[:, None]

    def assert_route(self) -> None:
        """Assert on the device that routes of real tokens are in range.

        On CUDA, where routes were not read on the host.
        """
        if self.q.device.type == "cuda":
            inside, real = (self.route >= 0) & (self.route < len(self.experts)), self.real()
            inside = inside if real is None else inside | ~real[..., None]
            torch._assert_async(inside.all(), "route out of range")

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        """Outputs of `sequences` [1, H, t, Dh], padded with zeros, as [B, H, Tq, Dh]."""
        if not rows:
            return torch.zeros_like(self.q)
        Tq = self.q.shape[2]
        return torch.cat([F.pad(row, (0, 0, 0, Tq - row.shape[2])) for row in rows])

    def without_padding(self, out: Tensor) -> Tensor:
        """`out` [B, H, Tq, Dh] with zeros on padding."""
        real = self.real()
        return out if real is None else out * real[:, None, :, None]


def resolve_experts(experts: Sequence[str | Expert], shape: ExpertShape) -> tuple[Expert, ...]:
    """Names become registered experts of this shape; built ones pass through."""
    if not experts:
        raise ValueError("experts: expected at least one; got none")
    return tuple(_build(expert_class(e), shape) if isinstance(e, str) else e for e in experts)


def _build(kind: type[Expert], shape: ExpertShape) -> Expert:
    return shared_expert(kind, shape) if kind.kernel.plain else kind(shape)  # type: ignore[arg-type] # hashable it is


@lru_cache(256)
def shared_expert(kind: type[Expert], shape: ExpertShape) -> Expert:
    """The built expert of a kind and shape, one for all calls.

    These own no tensors, and building modules takes longer than checking a call.
    """
    return kind(shape)


def check_problem(problem: RoutedProblem) -> tuple[int, int] | None:
    """Check a problem. Returns the lowest and highest route; None on CUDA or without tokens.

    Raises:
        ValueError: shapes, dtypes, devices or, on a CPU, values that do not fit.
        TypeError: something other than a tensor.
    """
    check_inputs(problem)
    q, route, heads = problem.q, problem.route, (problem.q.shape[1], problem.k.shape[1])
    if isinstance(route, Tensor) and route.dim() == 3 and not fits_units(route.shape[2], *heads):
        raise ValueError(
            f"route: expected [B, T], or [B, T, R] with R units that cut {heads[0]} query and "
            f"{heads[1]} key heads evenly; "
            f"got R = {route.shape[2]}"
        )
    units = route.shape[2:] if isinstance(route, Tensor) and route.dim() == 3 else (1,)
    return _check_integers(
        "route", route, (q.shape[0], q.shape[2], *units), q.device, len(problem.experts) - 1
    )


def check_inputs(problem: RoutedProblem) -> None:
    """`check_problem` of everything but the route."""
    q = problem.q
    check_attention_inputs(q, problem.k, problem.v)
    for name, x, like in (
        ("linear_q", problem.plain_q, q),
        ("linear_k", problem.plain_k, problem.k),
    ):
        if x is like:
            continue
        check_tensor(name, x)
        if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{name}: expected {tuple(like.shape)}, {like.dtype} on {like.device}; "
                f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
            )
    if problem.lengths is not None:
        _check_integers("lengths", problem.lengths, (q.shape[0],), q.device, q.shape[2])
    if problem.starts is not None:
        _check_integers(
            "starts", problem.starts, (q.shape[0],), q.device, problem.k.shape[2] - q.shape[2]
        )


def _check_integers(
    name: str, x: Tensor, shape: tuple[int, ...], device: torch.device, most: int
) -> tuple[int, int] | None:
    check_tensor(name, x)
    if x.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected int64 or int32; got {x.dtype}")
    if tuple(x.shape) != shape or x.device != device:
        raise ValueError(
            f"{name}: expected shape {shape} on {device}; got {tuple(x.shape)} on {x.device}"
        )
    if x.device.type != "cpu" or not x.numel():
        return None
    low, high = (int(bound) for bound in x.aminmax())
    if low < 0 or high > most:
        raise ValueError(f"{name}: expected values in 0..{most}; got {low}..{high}")
    return low, high


def check_window(window: object) -> int:
    """The window, if it is a whole number of keys."""
    if isinstance(window, bool) or not isinstance(window, Integral):  # an int, or numpy's
        raise TypeError(
            f"window: expected an int of at least 1, keys seen with the token's own; got {window!r}"
        )
    if window < 1:
        raise ValueError(f"window: expected at least 1 (a token sees itself); got {window}")
    return int(window)


def check_experts(experts: Sequence[object], shape: ExpertShape) -> None:
    """Raise for an expert that is neither a name nor built for this call.

    It may be built for other heads or another window.
    """
    for index, expert in enumerate(experts):
        if isinstance(expert, str):
            continue
        if not isinstance(expert, Expert):
            raise TypeError(
                f"experts[{index}]: expected a registered name or an Expert; got "
                f"{type(expert).__name__}"
            )
        who, own = f"experts[{index}] ({expert.name or type(expert).__name__})", expert.shape
        if own[:2] != shape[:2]:
            raise ValueError(
                f"{who}: expected one built for {shape.num_heads} heads of {shape.head_dim}, as q "
                f"has; "
                f"got {own.num_heads} of {own.head_dim}; build it with {shape}"
            )
        if isinstance(expert, LocalAttention) and own.window != shape.window:
            raise ValueError(
                f"window: expected {own.window}, that of the built {who}; got {shape.window}; pass "
                f"its window, or build it anew"
            )


def check_tensor(name: str, x: object) -> None:
    """Raise a TypeError for anything but a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a tensor; got {type(x).__name__}; make one with torch.tensor"
        )


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a ValueError that names the first of q, k, v that does not fit the others.

    What is compared are shapes, dtypes and devices.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [B, H, T, Dh]; got shape {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: expected {q.dtype} on {q.device} like q; got {x.dtype} on {x.device}"
            )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: expected batch {q.shape[0]} and head_dim {q.shape[3]} like q; got shape "
            f"{tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: expected shape {tuple(k.shape)} like k; got {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected a number of heads that divides q's {q.shape[1]}; got {k.shape[1]}"
        )
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"k: expected at least q's {q.shape[2]} positions; got {k.shape[2]}")
