"""The backend `auto`: of the library's own, the one measured to be the fastest for a problem."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Kernel
from bayes_router.attention.hard.backend import Backend, register_backend
from bayes_router.attention.hard.dense import DENSE
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.hard.reference import REFERENCE
from bayes_router.attention.hard.rows import TORCH
from bayes_router.attention.hard.short import SHORT, query_rows, unsorted_pays
from bayes_router.attention.hard.sorted import TRITON

# with this file the library's own are registered
__all__ = ["AUTO", "BREAK_EVEN", "BreakEven", "REFERENCE", "choose_backend"]


class BreakEven(NamedTuple):
    """Two backends, and up to how many keys the first is faster."""

    keys: int
    short: Backend
    long: Backend


BREAK_EVEN = {  # by CUDA or not, and whether gradients are needed
    (False, False): BreakEven(192, DENSE, TORCH),
    (False, True): BreakEven(160, DENSE, TORCH),
    (True, False): BreakEven(4096, SHORT, TRITON),
    (True, True): BreakEven(1024, SHORT, TRITON),
}
"""On a CPU what `python -m analysis.speed.break_even` printed, on one core of an AMD EPYC (AVX-512)
with torch 2.13; on CUDA an H100's (analysis/SPEED.md).

No backend computes two experts for the time of one, so that a mixed route through a short text is
slower than full attention alone. On that core, B1 H8 Dh64 W256, 10/60/30 full/linear/local, `auto`
took, in times of full attention:

    T                   16    64   128   256   512  1024  2048
    forward            6.4   3.5   2.6   1.6   1.1  0.83  0.62
    and backward       4.7   3.5   2.9   1.6   1.0  0.83  0.60

A route that all tokens share costs what its expert costs, where the host may look (on a CPU).
"""


FILLING = 2**14
"""Query heads times queries from which full and local attention, sorted, fill a device."""


def choose_backend(problem: RoutedProblem) -> Backend:
    """What `auto` takes.

    Never an error, and a function of shapes, dtype and device alone, so that nothing waits; of
    whether a CUDA graph is captured, too, whose launches cost little: full and local attention are
    sorted there as soon as they fill the device.
    """
    keys, short, long = BREAK_EVEN[problem.q.device.type == "cuda", problem.needs_grad]
    few = problem.k.shape[2] <= keys and (not problem.q.is_cuda or _launches_decide(problem))
    if few and short.refuses(problem) is None:
        return short
    return long if long.refuses(problem) is None else DENSE


def _launches_decide(problem: RoutedProblem) -> bool:
    """Whether fewer launches make up for more work on a CUDA device."""
    if problem.needs_grad:
        return unsorted_pays(problem)
    kernels = {expert.kernel for _, expert in problem.computed()}
    softmax = kernels <= {Kernel.FULL, Kernel.LOCAL}
    few = query_rows(problem) <= FILLING
    return few or not softmax or not torch.cuda.is_current_stream_capturing()


class _Auto:
    """By device, length, dtype and gradients, from measured break-even points."""

    name = "auto"

    def refuses(self, problem: RoutedProblem) -> str | None:
        """It refuses nothing: the backend `dense` computes everything."""
        return None

    def attend(self, problem: RoutedProblem) -> Tensor:
        """As the backend that `choose_backend` takes."""
        return choose_backend(problem).attend(problem)


AUTO = register_backend(_Auto())
