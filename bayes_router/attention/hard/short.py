"""The backend `short`: hard routing of short texts on CUDA in two launches.

A backward pass takes one more.
"""

import torch
from torch import Tensor

from bayes_router.attention.hard.backend import register_backend
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels import capability

QUERIES = 4096
"""Queries of a row that one program sorts."""
SHORTEST = 512
"""Keys up to which it is faster to sort nothing than to sort first."""
ROWS = 2**14
"""Query heads times queries of a call up to which that was read."""
HEAD_SIZE = 128
"""Shared memory ends there."""

UNHELD = (
    "its backward pass takes bfloat16, heads of 64, one unit, the same q and k for every expert, "
    "and neither padding nor sinks"
)


def unsorted_holds(problem: RoutedProblem) -> bool:
    """Whether it is of the kind for which unsorted kernels were held to the reference on a card.

    bfloat16, heads of 64, one choice for all of them, the same queries and keys for every expert,
    every query real and none before its keys.
    """
    kind = problem.q.dtype == torch.bfloat16 and problem.q.shape[3] == 64 and problem.units == 1
    same = problem.plain_q is problem.q and problem.plain_k is problem.k
    sinks = any(expert.shape.sinks for _, expert in problem.computed())
    return kind and same and not sinks and problem.lengths is None and problem.starts is None


def query_rows(problem: RoutedProblem) -> int:
    """Query heads times queries of all rows of the batch."""
    B, H, T, _ = problem.q.shape
    return B * H * T


class _Short:
    """Two launches; up to `SHORTEST` keys, and with gradients, none of them sorts."""

    name = "short"

    def refuses(self, problem: RoutedProblem) -> str | None:
        """It needs CUDA, Triton, heads of at most 128 and few queries.

        The built-in experts stand there at most once each. A backward pass needs as many queries as
        keys, and what `unsorted_holds` asks for.
        """
        reason = capability.lacks(problem.q, HEAD_SIZE)
        if reason is not None:
            return reason
        kernels = [expert.kernel for _, expert in problem.computed()]
        if len(set(kernels)) < len(kernels) or not all(kernel.plain for kernel in kernels):
            return "it computes at most one each of the built-in experts full, linear and local"
        if problem.q.shape[2] > QUERIES:
            return f"it sorts up to {QUERIES} queries; these are {problem.q.shape[2]}"
        if not problem.needs_grad:
            return None
        if problem.q.shape[2] != problem.k.shape[2]:
            return "its backward pass needs as many queries as keys"
        if not unsorted_holds(problem):
            return UNHELD
        return None

    def attend(self, problem: RoutedProblem) -> Tensor:
        """See `Backend.attend`."""
        # only where Triton can be imported
        from bayes_router.attention.hard.mixed_launch import launch_mixed
        from bayes_router.attention.hard.short_launch import launch_short

        few = problem.k.shape[2] <= SHORTEST and query_rows(problem) <= ROWS
        unsorted = problem.needs_grad or (few and unsorted_holds(problem))
        return launch_mixed(problem) if unsorted else launch_short(problem)


SHORT = register_backend(_Short())
