"""Hard routing: each token gets the one expert that it took, and only that is computed.

`routed_attention` checks its inputs and hands them to a backend; the backends are one file each.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.hard.auto import AUTO
from bayes_router.attention.hard.backend import Backend, backend_of, run
from bayes_router.attention.hard.problem import (
    RoutedProblem,
    check_experts,
    check_inputs,
    check_problem,
    check_window,
    resolve_experts,
)
from bayes_router.attention.shapes import ExpertShape, with_units

EXPERTS = ("full", "linear", "local")


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | int,
    *,
    window: int,
    linear_q: Tensor | None = None,
    linear_k: Tensor | None = None,
    backend: Backend | str = AUTO,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    experts: Sequence[str | Expert] = EXPERTS,
) -> Tensor:
    """Attention of each token by the expert that it takes, computing little else.

    `out[b, h, t] = experts[route[b, t, r]](q, k, v)[b, h, t]` for the unit r of head h.

    Args:
        q: [B, H, Tq, Dh]; query t of row b stands at position starts[b] + t and sees the keys up to
            there.
        k: [B, Hkv, Tk, Dh], Tk >= Tq, H a multiple of Hkv.
        v: as k.
        route: int64 or int32 [B, Tq, R], indices into `experts`: a choice for each of R units of H
            / R neighbouring query heads, R = 1, Hkv or H; [B, Tq] is one choice for all heads. Or
            one int for all tokens, which then costs what that expert costs and no more, on any
            device.
        window: W >= 1, visible keys of the local expert, self included; that of a built one, if
            there is one.
        linear_q: queries for experts that take no rotary positions; default q.
        linear_k: keys for them; default k.
        backend: the name of a backend (`auto`, `torch`, `dense`, `reference`, on CUDA also `triton`
            and `short`, or one that `register_backend` has made known), or the object.
        lengths: [B] real queries of each row; the rest is right padding and comes out as zero.
        starts: [B] position of each row's first query; default Tk - Tq. Keys after a row's last
            query are never seen.
        experts: registered names or built experts. One without a `kernel` computes its own rows
            (`Expert.attend_rows`).

    Returns:
        [B, H, Tq, Dh] in q's dtype.

    Raises:
        ValueError: an argument that does not fit, named, with what was expected. On CUDA the values
            of route are not read (that would synchronise): one out of range is a device-side
            assertion.
        TypeError: an argument of another kind, as a list for a tensor.
        RuntimeError: the backend asked for cannot run here, with the reason.
    """
    choice = backend_of(backend)
    if isinstance(route, bool) or not isinstance(route, (int, Tensor)):
        raise TypeError(
            f"route: expected an int or a tensor int64 [B, T]; got {type(route).__name__}; use "
            f"torch.tensor(route)"
        )
    built = _build(experts, q, window)
    given = with_units(route) if isinstance(route, Tensor) else _NO_ROUTE
    plain_q, plain_k = q if linear_q is None else linear_q, k if linear_k is None else linear_k
    problem = RoutedProblem(q, k, v, plain_q, plain_k, given, built, lengths, starts)
    whole = choice is AUTO and starts is None  # a route that all take needs no dispatch then
    if isinstance(route, Tensor):
        only = _only(problem)
        if whole and only is not None:
            problem.assert_route()
            return _all_on(built[only], problem)
        return run(choice, problem)
    if not 0 <= route < len(built):
        raise ValueError(f"route: expected values in 0..{len(built) - 1}; got {route}")
    check_inputs(problem)
    if whole:
        return _all_on(built[route], problem)
    everywhere = torch.full((), route, device=q.device).expand(q.shape[0], q.shape[2], 1)
    return run(choice, replace(problem, route=everywhere))


def _build(experts: Sequence[str | Expert], q: Tensor, window: int) -> tuple[Expert, ...]:
    """The experts for the heads of q, on its device; `check_inputs` names a q that has no heads."""
    window = check_window(window)
    heads = isinstance(q, Tensor) and q.dim() == 4
    shape = ExpertShape(q.shape[1], q.shape[3], window) if heads else ExpertShape(1, 1, window)
    if heads:
        check_experts(experts, shape)
    return tuple(
        e if e.kernel.plain else _moved(e, q.device) for e in resolve_experts(experts, shape)
    )


def _moved(expert: Expert, device: torch.device) -> Expert:
    """The expert on this device; one that is there is not asked to move, which takes longer."""
    there = all(x.device == device for x in (*expert.parameters(), *expert.buffers()))
    return expert if there else expert.to(device)


def _only(problem: RoutedProblem) -> int | None:
    """The expert that all tokens of a checked route take, as far as its check found that out."""
    found = check_problem(problem)
    if len(problem.experts) == 1:
        return 0
    return found[0] if found is not None and found[0] == found[1] else None


_NO_ROUTE = torch.empty(0, 0, 1, dtype=torch.int64)


def _all_on(expert: Expert, problem: RoutedProblem) -> Tensor:
    """Every token on one expert: its own pass, and no dispatch."""
    out: Tensor = expert(*problem.inputs(expert))
    return problem.without_padding(out)
