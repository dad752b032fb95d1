"""Hard routing: each token gets the one expert that it took, and only that is computed.

`routed_attention` checks its inputs and hands them to a backend; the backends are one file each.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.experts.full import FullAttention
from bayes_router.attention.experts.linear import LinearAttention
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.hard import dense, reference, rows
from bayes_router.attention.hard.problem import (
    BUILT_IN,
    RoutedProblem,
    check_experts,
    check_inputs,
    check_problem,
    check_window,
    resolve_experts,
)
from bayes_router.attention.kernels.capability import HAS_TRITON
from bayes_router.attention.shapes import ExpertShape
from bayes_router.checks import choose

EXPERTS = ("full", "linear", "local")
SHORT_QUERIES = 4096
"""Queries of a row that one program of the backend `short` sorts."""


class Backend(Enum):
    """Who computes a routed attention."""

    REFERENCE = "reference"  # the float64 oracle, any device
    TORCH = "torch"  # gathers in plain torch, any device, made for the CPU; on CUDA it synchronises
    TRITON = "triton"  # own kernels over sorted tokens, CUDA, forward and backward
    SHORT = "short"  # two launches in all, CUDA, forward, the built-in experts, for short texts
    DENSE = "dense"  # every expert over every token, then selected; any device
    AUTO = "auto"  # by device, length, dtype and gradients, from measured break-even points


class BreakEven(NamedTuple):
    """Two backends, and up to how many keys the first is the faster."""

    keys: int
    short: Backend
    long: Backend


BREAK_EVEN = {  # by CUDA or not, and whether gradients are needed
    (False, False): BreakEven(192, Backend.DENSE, Backend.TORCH),
    (False, True): BreakEven(160, Backend.DENSE, Backend.TORCH),
    (True, False): BreakEven(4096, Backend.SHORT, Backend.TRITON),
    (True, True): BreakEven(0, Backend.DENSE, Backend.TRITON),
}
"""On a CPU what `python -m analysis.speed.break_even` printed, on one core of an AMD EPYC (AVX-512) with torch 2.13; on CUDA an
H100's (analysis/SPEED.md); with gradients there, nothing else was measured.

No backend computes two experts for the time of one, so that a mixed route through a short text is slower than full attention
alone. On that core, B1 H8 Dh64 W256, 10/60/30 full/linear/local, `auto` took, in times of full attention:

    T                   16    64   128   256   512  1024  2048
    forward            6.4   3.5   2.6   1.6   1.1  0.83  0.62
    and backward       4.7   3.5   2.9   1.6   1.0  0.83  0.60

A route that all tokens share costs what its expert costs, where the host may look (on a CPU).
"""


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | int,
    *,
    window: int,
    linear_q: Tensor | None = None,
    linear_k: Tensor | None = None,
    backend: Backend | str = Backend.AUTO,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    experts: Sequence[str | Expert] = EXPERTS,
) -> Tensor:
    """out[b, :, t] = experts[route[b, t]](q, k, v)[b, :, t], computing as little else as the backend can.

    Args:
        q: [B, H, Tq, Dh]; query t of row b stands at position starts[b] + t and sees the keys up to there.
        k: [B, Hkv, Tk, Dh], Tk >= Tq, H a multiple of Hkv.
        v: as k.
        route: int64 or int32 [B, Tq], indices into `experts`; or one int for all tokens, which then costs what that expert
            costs and no more, on any device.
        window: W >= 1, visible keys of the local expert, self included; that of a built one, if there is one.
        linear_q: queries for experts that take no rotary positions; default q.
        linear_k: keys for them; default k.
        backend: a `Backend` or its value.
        lengths: [B] real queries of each row; the rest is right padding and comes out as zero.
        starts: [B] position of each row's first query; default Tk - Tq. Keys after a row's last query are never seen.
        experts: registered names or built experts. Built-in ones are recognised by their exact type; any other computes its
            own rows (`Expert.attend_rows`).

    Returns:
        [B, H, Tq, Dh] in q's dtype.

    Raises:
        ValueError: an argument that does not fit, named, with what was expected. On CUDA the values of route are not read
            (that would synchronise): one out of range is a device-side assertion.
        TypeError: an argument of another kind, as a list for a tensor.
        RuntimeError: the backend asked for cannot run here, with the reason.
    """
    choice = choose("backend", backend, Backend)
    four = isinstance(q, Tensor) and q.dim() == 4  # else `check_inputs` says so
    shape = ExpertShape(q.shape[1], q.shape[3], check_window(window)) if four else ExpertShape(1, 1, check_window(window))
    if four:
        check_experts(experts, shape)
    built = tuple(e if type(e) in BUILT_IN else e.to(q.device) for e in resolve_experts(experts, shape))
    plain_q, plain_k = q if linear_q is None else linear_q, k if linear_k is None else linear_k
    if isinstance(route, bool) or not isinstance(route, (int, Tensor)):
        raise TypeError(f"route: expected an int or a tensor int64 [B, T]; got {type(route).__name__}; use torch.tensor(route)")
    whole = choice is Backend.AUTO and starts is None  # a route that all take needs no dispatch then
    if isinstance(route, Tensor):
        problem = RoutedProblem(q, k, v, plain_q, plain_k, route, built, lengths, starts)
        found = check_problem(problem)
        only = 0 if len(built) == 1 else found[0] if found is not None and found[0] == found[1] else None
        if whole and only is not None:
            _assert_route(problem)
            return _all_on(built[only], problem)
        return run_problem(pick_backend(choice, problem), problem)
    if not 0 <= route < len(built):
        raise ValueError(f"route: expected values in 0..{len(built) - 1}; got {route}")
    problem = RoutedProblem(q, k, v, plain_q, plain_k, _NO_ROUTE, built, lengths, starts)
    check_inputs(problem)
    if whole:
        return _all_on(built[route], problem)
    problem = replace(problem, route=torch.full((), route, device=q.device).expand(q.shape[0], q.shape[2]))
    return run_problem(pick_backend(choice, problem), problem)


_NO_ROUTE = torch.empty(0, dtype=torch.int64)


def _all_on(expert: Expert, problem: RoutedProblem) -> Tensor:
    """Every token on one expert: its own pass, and no dispatch."""
    out: Tensor = expert(*problem.inputs(expert))
    return _without_padding(problem, out)


def pick_backend(choice: Backend, problem: RoutedProblem) -> Backend:
    """The backend asked for, or a RuntimeError that says why it cannot run; for AUTO, `choose_backend`."""
    if choice is Backend.AUTO:
        return choose_backend(problem)
    reason = unavailable(choice, problem)
    if reason:
        raise RuntimeError(f"backend {choice.value!r} cannot run here: {reason}; backend='auto' picks one that can")
    return choice


def choose_backend(problem: RoutedProblem) -> Backend:
    """What `auto` takes: never an error, and a function of shapes, dtype and device alone (no synchronisation).

    The break-even points are `BREAK_EVEN`'s.
    """
    keys, short, long = BREAK_EVEN[problem.q.device.type == "cuda", problem.needs_grad]
    if problem.k.shape[2] <= keys and unavailable(short, problem) is None:
        return short
    return long if unavailable(long, problem) is None else Backend.DENSE


def unavailable(backend: Backend, problem: RoutedProblem) -> str | None:
    """Why this backend cannot compute this problem; None where it can."""
    if backend in (Backend.REFERENCE, Backend.TORCH, Backend.DENSE):
        return None
    if problem.q.device.type != "cuda":
        return f"it needs CUDA tensors; these are on {problem.q.device}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if problem.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes float32, bfloat16 and float16; these are {problem.q.dtype}"
    most = 128 if backend is Backend.SHORT or problem.q.dtype == torch.float32 else 256  # shared memory ends there
    if problem.q.shape[3] > most:
        return f"it holds head sizes up to {most} in {problem.q.dtype}; this is {problem.q.shape[3]}"
    if backend is Backend.SHORT:
        kinds = [type(expert) for _, expert in problem.computed()]
        if len(set(kinds)) < len(kinds) or not set(kinds).issubset(BUILT_IN):
            return "it computes at most one each of the built-in experts full, linear and local"
        if problem.q.shape[2] > SHORT_QUERIES:
            return f"it sorts up to {SHORT_QUERIES} queries; these are {problem.q.shape[2]}"
        return "it has no backward pass" if problem.needs_grad else None
    if problem.needs_grad and problem.q.shape[2] != problem.k.shape[2]:
        return "its backward pass needs as many queries as keys"
    return None


def available_backends(device: torch.device | str) -> tuple[Backend, ...]:
    """Backends that run on this device with the packages installed."""
    everywhere = (Backend.REFERENCE, Backend.TORCH, Backend.DENSE)
    if torch.device(device).type != "cuda" or not HAS_TRITON:
        return everywhere
    return (*everywhere, Backend.TRITON, Backend.SHORT)


def run_problem(backend: Backend, problem: RoutedProblem) -> Tensor:
    """Compute a checked problem with a backend that can: [B, H, Tq, Dh]."""
    if backend in (Backend.REFERENCE, Backend.TORCH, Backend.DENSE):  # the kernels look themselves
        _assert_route(problem)
    if backend is Backend.REFERENCE:
        return _stack(problem, [_reference(one) for one in problem.sequences()])
    if backend is Backend.DENSE:
        if problem.starts is not None:
            return _stack(problem, [dense.attend(one) for one in problem.sequences()])
        return _without_padding(problem, dense.attend(problem))
    if backend is Backend.SHORT:
        from bayes_router.attention.hard import short  # only where it can be imported

        return short.attend(problem)
    if backend is Backend.TRITON:
        from bayes_router.attention.hard import sorted  # only where it can be imported

        return sorted.attend(problem)
    return rows.attend(problem)


def _reference(one: RoutedProblem) -> Tensor:
    """Each built-in expert by its formula in float64, any other by its own dense pass; B = 1."""
    out = torch.zeros_like(one.q)
    for index, expert in one.computed():
        q, k, v = one.inputs(expert)
        if type(expert) is FullAttention:
            dense = reference.softmax_attention(q, k, v)
        elif type(expert) is LocalAttention:
            dense = reference.softmax_attention(q, k, v, expert.shape.window, expert.shape.sinks)
        elif type(expert) is LinearAttention:
            dense = reference.linear_attention(q, k, v)
        else:
            dense = expert(q, k, v)
        out = torch.where((one.route == index)[:, None, :, None], dense.to(out.dtype), out)
    return out


def _assert_route(problem: RoutedProblem) -> None:
    """On CUDA, where routes were not read, a device-side assertion that those of real tokens are in range."""
    if problem.q.device.type == "cuda":
        inside, real = (problem.route >= 0) & (problem.route < len(problem.experts)), problem.real()
        inside = inside if real is None else inside | ~real
        torch._assert_async(inside.all(), "route out of range")


def _stack(problem: RoutedProblem, rows: list[Tensor]) -> Tensor:
    """Rows [1, H, t, Dh] padded with zeros to [B, H, Tq, Dh]."""
    if not rows:
        return torch.zeros_like(problem.q)
    Tq = problem.q.shape[2]
    return torch.cat([torch.nn.functional.pad(row, (0, 0, 0, Tq - row.shape[2])) for row in rows])


def _without_padding(problem: RoutedProblem, out: Tensor) -> Tensor:
    real = problem.real()
    return out if real is None else out * real[:, None, :, None]
