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
HEAD_SIZE = 128
"""Shared memory ends there."""


def unsorted_pays(problem: RoutedProblem) -> bool:
    """Whether it is faster to sort nothing, by how many pairs of a query and a key there are.

    What `python -m analysis.speed.unsorted` printed on an H100. With gradients sorting takes a
    dozen launches, so that more pairs pay for it; programs of keys that query heads share are few.
    """
    (_, H, _, D), (_, HK, keys, _) = problem.q.shape, problem.k.shape
    pairs = query_rows(problem) * keys
    if problem.q.dtype == torch.float32:  # its products are not tensor-core ones
        return problem.needs_grad and D <= 64 and pairs <= 2**20
    if problem.needs_grad:
        return pairs <= (2**24 if D <= 64 and H == HK else 2**22)
    if keys <= 256:
        return pairs <= 2**23
    light = D <= 32 or (D <= 64 and problem.reads_one_pair)
    return light and keys <= 512 and pairs <= 2**22


def query_rows(problem: RoutedProblem) -> int:
    """Query heads times queries of all rows of the batch."""
    B, H, T, _ = problem.q.shape
    return B * H * T


class _Short:
    """Two launches, of which none sorts with gradients, or where `unsorted_pays`."""

    name = "short"

    def refuses(self, problem: RoutedProblem) -> str | None:
        """It needs CUDA, Triton, heads of at most 128 and few queries.

        The built-in experts stand there at most once each. A backward pass needs as many queries as
        keys.
        """
        reason = capability.lacks(problem.q, HEAD_SIZE)
        if reason is not None:
            return reason
        kernels = [expert.kernel for _, expert in problem.computed()]
        if len(set(kernels)) < len(kernels) or not all(kernel.plain for kernel in kernels):
            return "it computes at most one each of the built-in experts full, linear and local"
        if problem.q.shape[2] > QUERIES:
            return f"it sorts up to {QUERIES} queries; these are {problem.q.shape[2]}"
        if problem.needs_grad and problem.q.shape[2] != problem.k.shape[2]:
            return "its backward pass needs as many queries as keys"
        return None

    def attend(self, problem: RoutedProblem) -> Tensor:
        """See `Backend.attend`."""
        # only where Triton can be imported
        from bayes_router.attention.hard.mixed_launch import launch_mixed
        from bayes_router.attention.hard.short_launch import launch_short

        unsorted = problem.needs_grad or unsorted_pays(problem)
        return launch_mixed(problem) if unsorted else launch_short(problem)


SHORT = register_backend(_Short())
