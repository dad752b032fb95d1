"""The backend `short`: hard routing of short texts in two launches.

On CUDA, without a backward pass.
"""

from torch import Tensor

from bayes_router.attention.hard.backend import register_backend
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels import capability

QUERIES = 4096
"""Queries of a row that one program sorts."""
HEAD_SIZE = 128
"""Shared memory ends there."""


class _Short:
    """Two launches in all, which neither sort nor plan beforehand."""

    name = "short"

    def refuses(self, problem: RoutedProblem) -> str | None:
        """It needs CUDA, Triton, heads of at most 128, few queries, and no gradients.

        The built-in experts stand there at most once each.
        """
        reason = capability.lacks(problem.q, HEAD_SIZE)
        if reason is not None:
            return reason
        kernels = [expert.kernel for _, expert in problem.computed()]
        if len(set(kernels)) < len(kernels) or not all(kernel.plain for kernel in kernels):
            return "it computes at most one each of the built-in experts full, linear and local"
        if problem.q.shape[2] > QUERIES:
            return f"it sorts up to {QUERIES} queries; these are {problem.q.shape[2]}"
        return "it has no backward pass" if problem.needs_grad else None

    def attend(self, problem: RoutedProblem) -> Tensor:
        """See `Backend.attend`."""
        # only where Triton can be imported
        from bayes_router.attention.hard.short_launch import launch_short

        return launch_short(problem)


SHORT = register_backend(_Short())
