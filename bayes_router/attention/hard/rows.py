"""The backend `torch`: the queries of each expert gathered by position, in tiles, in plain torch.

Any device; made for the CPU.

One sequence and routing unit at a time, q [H, Tq, Dh], k and v [Hkv, Tk, Dh] of the unit's heads,
the queries the last Tq of Tk positions; `rows` are ascending indices of queries. Queries of a unit
that share a key head are packed side by side, so that keys are never repeated. Nothing is T x T:
the widest mask is ROWS x T. It reads counts on the host, which synchronises on CUDA.

For the backward pass only the inputs, the output, and softmax normalisers or segment states are
kept; it takes the same tiles again one by one and adds to one gradient of each input.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bayes_router.attention.experts.contract import Expert, Kernel
from bayes_router.attention.hard.backend import register_backend
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels.eager import rows_linear
from bayes_router.attention.kernels.eager.rows_linear import take
from bayes_router.attention.kernels.eager.rows_softmax import softmax_rows, softmax_rows_backward
from bayes_router.attention.kernels.eager.threads import Steps, rest, run
from bayes_router.attention.shapes import ExpertShape, unit_heads, widen


class Gathering(NamedTuple):
    """Queries of one sequence and unit that are computed together."""

    expert: Expert
    local: ExpertShape | None  # window and sinks, where they hide something
    rows: Tensor  # [n]
    heads: slice  # the unit's query heads
    key_heads: slice
    wide: Tensor | None = None  # bool [n]: those on full, where local ones are computed with them


class Targets(NamedTuple):
    """Gradients of one sequence, that its experts add to: [heads, T, Dh]."""

    q: Tensor
    k: Tensor
    v: Tensor
    plain_q: Tensor
    plain_k: Tensor


class Kept(NamedTuple):
    """What the backward pass needs of them."""

    group: Gathering
    notes: Any  # normalisers [H, n] of softmax, states of linear attention


class _Torch:
    """Gathers in plain torch, any device, made for the CPU; on CUDA it synchronises."""

    name = "torch"

    def refuses(self, problem: RoutedProblem) -> str | None:
        """It refuses nothing."""
        return None

    def attend(self, problem: RoutedProblem) -> Tensor:
        """See `Backend.attend`."""
        problem.assert_route()
        return _attend(problem)


TORCH = register_backend(_Torch())


def _attend(problem: RoutedProblem) -> Tensor:
    if problem.needs_grad and any(
        x.requires_grad for x in (problem.q, problem.k, problem.v, problem.plain_q, problem.plain_k)
    ):
        plain_q = None if problem.plain_q is problem.q else problem.plain_q
        plain_k = None if problem.plain_k is problem.k else problem.plain_k
        out: Tensor = _Gathered.apply(problem, problem.q, problem.k, problem.v, plain_q, plain_k)
    else:
        out = _forward(problem, None)
    for index, expert in problem.computed():
        if not expert.kernel.plain:
            out = _own_rows(problem, index, expert, out)
    return out


def _own_rows(problem: RoutedProblem, index: int, expert: Expert, out: Tensor) -> Tensor:
    """`out` with the rows of an expert without a plain kernel.

    It may compute anything, and answers for its own rows.
    """
    parts = []
    for b, one in enumerate(problem.sequences()):
        chosen = one.route == index  # [1, t, R]
        part = out[b : b + 1]
        if chosen.any():
            missing = (0, 0, 0, part.shape[2] - chosen.shape[1])
            rows = F.pad(expert.attend_units(*one.inputs(expert), chosen), missing)
            part = torch.where(F.pad(one.chosen(index), missing), rows, part)
        parts.append(part)
    return torch.cat(parts) if parts else out


def _groups(one: RoutedProblem, alone: bool) -> Iterator[Gathering]:
    """The plain experts that some token took.

    Those that compute the same, as local attention in a short text, are one; `alone`, without a
    backward pass, so are full and local in a text of at most two windows, where their tiles would
    hold the same keys.
    """
    kinds: dict[tuple[bool, ExpertShape | None], list[int]] = {}
    for index, expert in one.computed():
        if expert.kernel.plain:
            hides = expert.kernel is Kernel.LOCAL and expert.shape.window < one.k.shape[2]
            kinds.setdefault(
                (expert.kernel is Kernel.LINEAR, expert.shape if hides else None), []
            ).append(index)
    near = [shape for _, shape in kinds if shape is not None]
    joined = alone and len(near) == 1 and one.k.shape[2] <= 2 * near[0].window and FULL in kinds
    H, Hkv = one.q.shape[1], one.k.shape[1]
    for (heads, key_heads), route in zip(
        unit_heads(one.units, H, Hkv), one.route[0].unbind(1), strict=True
    ):
        taken = {kind: _taken(route, indices) for kind, indices in kinds.items()}
        wide = taken.pop(FULL) if joined else None
        for kind, chosen in taken.items():
            both = wide if kind[1] is not None else None
            rows = (chosen if both is None else chosen | both).nonzero()[:, 0]
            on_full = None if both is None else both[rows]
            if rows.numel():
                expert = one.experts[kinds[kind][0]]
                yield Gathering(expert, kind[1], rows, heads, key_heads, on_full)


FULL: tuple[bool, ExpertShape | None] = (False, None)
"""The kind of the experts that hide no key before a query's own."""


def _taken(route: Tensor, indices: list[int]) -> Tensor:
    """Which of a unit's queries [T] took one of these experts."""
    index, *others = indices
    chosen = route == index
    for other in others:
        chosen |= route == other
    return chosen


def _forward(problem: RoutedProblem, kept: list[list[Kept]] | None) -> Tensor:
    """Rows of the plain experts, zero elsewhere.

    What the backward pass needs is appended to `kept`, one list a sequence.
    """
    return (run if kept is None else rest)(_forward_steps(problem, kept)).transpose(1, 2)


def _forward_steps(problem: RoutedProblem, kept: list[list[Kept]] | None) -> Steps[Tensor]:
    """The rows of every sequence [B, Tq, H, Dh]."""
    B, H, Tq, Dh = problem.q.shape
    out = problem.q.new_zeros(B, Tq, H, Dh)  # a step's: to fill it is shared between threads, too
    for row, one in enumerate(problem.sequences()):
        if kept is not None:
            kept.append([])
        for group in _groups(one, kept is None):
            notes = yield from _group_forward(one, group, out[row, :, group.heads], kept is None)
            if kept is not None:
                kept[row].append(Kept(group, notes))
    return out


def _group_forward(one: RoutedProblem, group: Gathering, out: Tensor, alone: bool) -> Steps[Any]:
    """Write the rows of one expert and unit to out [Tq, heads, Dh]; what its backward pass needs,
    if it is not this pass alone.
    """
    expert, local, rows, heads, key_heads, wide = group
    x, key, value = one.inputs(expert)
    x, key, value = x[:, heads], key[:, key_heads], value[:, key_heads]
    if alone and wide is None and rows.numel() == one.q.shape[2]:  # nothing to gather
        out[: rows.numel()] = expert(x, key, value)[0].transpose(0, 1)
        yield
        return None
    q, k, v = x[0], key[0], value[0]
    if expert.kernel is Kernel.LINEAR:
        states: list[rows_linear.Before] | None = None if alone else []
        for here, part in rows_linear.linear_rows(q, k, v, rows, states):
            out.index_copy_(0, rows[here], part.to(out.dtype))
            yield
        return states
    places = rows + (k.shape[1] - q.shape[1])
    found, normaliser = yield from softmax_rows(take(q, rows), k, v, places, local, wide)
    out.index_copy_(0, rows, found.transpose(0, 1))
    return normaliser


class _Gathered(torch.autograd.Function):
    """`_forward` with its backward pass; plain_q and plain_k are None where they are q and k."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: RoutedProblem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plain_q: Tensor | None,
        plain_k: Tensor | None,
    ) -> Tensor:
        kept: list[list[Kept]] = []
        out = _forward(problem, kept)
        ctx.save_for_backward(q, k, v, plain_q, plain_k, out)
        none = torch.empty(0)  # the tensors are saved apart, once
        ctx.problem = replace(problem, q=none, k=none, v=none, plain_q=none, plain_k=none)
        ctx.kept = kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, plain_q, plain_k, out = ctx.saved_tensors
        problem = replace(
            ctx.problem,
            q=q,
            k=k,
            v=v,
            plain_q=q if plain_q is None else plain_q,
            plain_k=k if plain_k is None else plain_k,
        )
        dq, dk, dv = (torch.zeros_like(x, dtype=widen(x[:0]).dtype) for x in (q, k, v))
        dplain_q = dq if plain_q is None else torch.zeros_like(plain_q, dtype=dq.dtype)
        dplain_k = dk if plain_k is None else torch.zeros_like(plain_k, dtype=dk.dtype)
        targets = dq, dk, dv, dplain_q, dplain_k
        rest(_backward_steps(problem, ctx.kept, out, gradients[0], targets))
        return (
            None,
            dq.to(q.dtype),
            dk.to(k.dtype),
            dv.to(v.dtype),
            None if plain_q is None else dplain_q.to(q.dtype),
            None if plain_k is None else dplain_k.to(k.dtype),
        )


def _backward_steps(
    problem: RoutedProblem,
    kept: list[list[Kept]],
    out: Tensor,
    dout: Tensor,
    targets: tuple[Tensor, ...],
) -> Steps[None]:
    """Add the gradients of every sequence to those of q, k, v, plain_q and plain_k."""
    for row, (one, notes) in enumerate(zip(problem.sequences(), kept, strict=True)):
        mine = Targets(*(x[row] for x in targets))
        for group in notes:
            yield from _group_backward(one, group, out[row], dout[row], mine)


def _group_backward(
    one: RoutedProblem, kept: Kept, out: Tensor, dout: Tensor, targets: Targets
) -> Steps[None]:
    """Add the gradients of one expert and unit; out, dout and the targets are of its sequence."""
    (expert, local, rows, heads, key_heads, _), notes = kept
    queries, keys = slice(0, one.q.shape[2]), slice(0, one.k.shape[2])
    dq, dk, dv, dplain_q, dplain_k = targets
    to_q, to_k = (dq, dk) if expert.rotary else (dplain_q, dplain_k)
    mine = to_q[heads, queries], to_k[key_heads, keys], dv[key_heads, keys]
    x, key, value = (x[0] for x in one.inputs(expert))
    sides = x[heads], key[key_heads], value[key_heads], rows, notes, out[heads], dout[heads]
    if expert.kernel is Kernel.LINEAR:
        yield from rows_linear.linear_rows_backward(*sides, *mine)
    else:
        yield from softmax_rows_backward(*sides, local, *mine)
