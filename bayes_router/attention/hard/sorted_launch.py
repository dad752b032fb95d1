"""What the backend `triton` launches: the routed forward and backward pass.

Static shapes, no host synchronisation.

The kernels compute the first full, the first local and the first linear, gated or mapped expert;
any other computes its own rows (`Expert.attend_rows`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_router.attention.experts.contract import Kernel
from bayes_router.attention.experts.gated import GatedLinearAttention
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels.capability import LOG2_E, packed, padded
from bayes_router.attention.kernels.triton.call import (
    Call,
    Tiles,
    multiprocessors,
    takes_hopper,
    tiles,
)
from bayes_router.attention.kernels.triton.launch_backward import backward
from bayes_router.attention.kernels.triton.launch_forward import Begun, begin, forward
from bayes_router.attention.kernels.triton.plan import make_plan, make_work
from bayes_router.attention.shapes import by_head

# in the order of `kernels.triton.plan`
PLACES = {Kernel.FULL: 0, Kernel.LINEAR: 1, Kernel.GATED: 1, Kernel.LOCAL: 2}


def launch_sorted(problem: RoutedProblem) -> Tensor:
    """[B, H, Tq, Dh] of a checked problem on CUDA."""
    native = native_experts(problem)
    # kernels run on the current device, whatever their tensors are on
    with torch.cuda.device_of(problem.q):
        out = _attend_native(problem, native)[..., : problem.q.shape[3]]
    real = problem.real()
    for index, expert in problem.computed():
        if index not in native:
            chosen = problem.route == index  # [B, Tq, R]
            chosen = chosen if real is None else chosen & real[..., None]
            rows = expert.attend_units(*problem.inputs(expert), chosen)
            out = torch.where(by_head(chosen, problem.q.shape[1]), rows, out)
    return out


def native_experts(problem: RoutedProblem) -> tuple[int, int, int]:
    """Index among the experts of the one that each kind of kernel computes.

    -1 where there is none.
    """
    indices = [-1, -1, -1]
    for index, expert in problem.computed():
        place = PLACES.get(expert.kernel)
        if place is not None and indices[place] < 0:
            indices[place] = index
    return indices[0], indices[1], indices[2]


def _pad(x: Tensor, value: float = 0.0) -> Tensor:
    return packed(padded(x, value))


def _inputs(
    problem: RoutedProblem, linear: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, then queries and keys of the linear expert and its log gates, if it has any.

    A gated expert gives features, padded with zeros; of plain queries and keys the feature map
    sends -inf to 0.
    """
    q, k, v, plain_q, plain_k = problem.q, problem.k, problem.v, problem.plain_q, problem.plain_k
    rotated = _pad(q), _pad(k), _pad(v)
    expert = problem.experts[linear] if linear >= 0 else None
    if isinstance(expert, GatedLinearAttention) and expert.kernel is Kernel.GATED:
        phi_q, phi_k, log_gate = expert.features(plain_q, plain_k)
        return *rotated, _pad(phi_q), _pad(phi_k), log_gate
    same = rotated[0].shape == q.shape
    linear_q = rotated[0] if same and plain_q is q else _pad(plain_q, -torch.inf)
    linear_k = rotated[1] if same and plain_k is k else _pad(plain_k, -torch.inf)
    return *rotated, linear_q, linear_k, None


def _attend_native(problem: RoutedProblem, native: tuple[int, int, int]) -> Tensor:
    *inputs, log_gate = _inputs(problem, native[1])
    q, k, v, _, plain_k = inputs
    sizes = tiles(q.shape[3], q.dtype, takes_hopper(q, k, v))
    begun = begin(native, sizes, q, k, v, plain_k, log_gate)
    try:
        call = _call(problem, native, sizes, begun, q, k.shape[2])
        if not problem.needs_grad:
            return forward(call, begun, *inputs)[0]
        out: Tensor = _RoutedAttention.apply(call, begun, *inputs, log_gate)
        return out
    finally:
        begun.beside.join()


def _call(
    problem: RoutedProblem,
    native: tuple[int, int, int],
    sizes: Tiles,
    begun: Begun,
    q: Tensor,
    num_keys: int,
) -> Call:
    """The sorted tokens, full attention's work items, and what else the launches need."""
    plan = make_plan(problem.route, native, len(problem.experts), problem.lengths)
    covered = problem.lengths is None and all(
        index in native for index in range(len(problem.experts))
    )
    if covered:  # else zeros come first
        begun.beside.mark()  # what needs no items does not wait for them
    programs, units = sizes.per_sm * multiprocessors(q.device), problem.units
    tile = sizes.full["BM"], sizes.full["BN"]
    heads, starts = q.shape[1] // units, problem.starts
    work = make_work(plan, units, heads, num_keys, starts, tile, programs, sizes.rounds)
    window, sinks = problem.experts[native[2]].shape[2:] if native[2] >= 0 else (1, 0)
    true_dim = problem.experts[0].shape.head_dim
    return Call(
        plan,
        work,
        native,
        window,
        sinks,
        LOG2_E / true_dim**0.5,
        problem.starts,
        num_keys - q.shape[2],
        covered,
        sizes,
        programs,
        units,
    )


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, begun: Begun, *inputs: Tensor) -> Tensor:
        out, lse = forward(call, begun, *inputs[:5])
        ctx.call = call
        ctx.save_for_backward(*inputs[:5], out, lse, begun.decay, *begun.state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, plain_q, plain_k, out, lse, decay, *state = ctx.saved_tensors
        dout = gradients[0] if gradients[0].stride(3) == 1 else gradients[0].contiguous()
        with torch.cuda.device_of(q):
            return (
                None,
                None,
                *backward(ctx.call, q, k, v, plain_q, plain_k, out, lse, decay, state, dout),
            )
