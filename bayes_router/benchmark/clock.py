"""The clock: calls take turns, and medians are compared.

On CUDA every turn reads a call twice, busy and isolated.
"""

import statistics
import time
from collections.abc import Callable

import torch

from bayes_router.timing import Timing, read_call

Thunk = Callable[[], object]
MOST = 15  # turns of a call


class Clock:
    """Times calls in turn.

    Args:
        device: where the calls run.
        budget: seconds for a group of calls.
        cpu_time: on a CPU, count the processor time of this process instead of the clock on the
            wall.
    """

    def __init__(self, device: torch.device, budget: float = 1.0, cpu_time: bool = False):
        self.device, self.budget = device, budget
        self.now = time.process_time if cpu_time else time.perf_counter
        self.once = 0.0
        """Seconds of a turn of the last calls."""

    def __call__(self, calls: dict[str, Thunk]) -> dict[str, Timing]:
        """Each call once to warm up, once to time it, then in turns.

        There are 1 to MOST turns, as many as the budget allows.
        """
        for call in calls.values():
            call()
        start = time.perf_counter()
        turns = [self._turn(calls)]
        self.once = max(time.perf_counter() - start, 1e-6)
        turns += [self._turn(calls) for _ in range(min(int(self.budget / self.once), MOST - 1))]
        return {
            name: Timing(*(statistics.median(turn[name][i] for turn in turns) for i in (0, 1)))
            for name in calls
        }

    def _turn(self, calls: dict[str, Thunk]) -> dict[str, Timing]:
        return {name: read_call(call, self.device, self.now) for name, call in calls.items()}


def captured(call: Thunk) -> Thunk:
    """A CUDA call recorded once in a graph; calling the result replays it over the same tensors.

    Raises:
        RuntimeError: the call waits for the device or otherwise cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compile, and fill what is cached
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()

    def replay() -> object:
        graph.replay()
        return held

    return replay
