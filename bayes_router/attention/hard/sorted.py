"""The backend `triton`: own kernels over tokens sorted by expert, forward and backward, on CUDA."""

from torch import Tensor

from bayes_router.attention.hard.backend import register_backend
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels import capability


class _Sorted:
    """Own kernels over sorted tokens; nothing waits for the device."""

    name = "triton"

    def refuses(self, problem: RoutedProblem) -> str | None:
        """It needs CUDA, Triton, and heads of at most 256 (float32: 128).

        A backward pass needs as many queries as keys.
        """
        reason = capability.lacks(problem.q)
        if reason is None and problem.needs_grad and problem.q.shape[2] != problem.k.shape[2]:
            return "its backward pass needs as many queries as keys"
        return reason

    def attend(self, problem: RoutedProblem) -> Tensor:
        """See `Backend.attend`."""
        # only where Triton can be imported
        from bayes_router.attention.hard.sorted_launch import launch_sorted

        return launch_sorted(problem)


TRITON = register_backend(_Sorted())
