"""The clock: calls take turns, and medians are compared.

On CUDA every turn reads a call twice, busy and isolated.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch

from bayes_router.timing import Timing, read_call

Thunk = Callable[[], object]
MOST = 15  # turns of a call


class OutOfTime(Exception):
    """What would be read next would not end in time, if it took as long as what was read last."""


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
        """Seconds of a turn of the last calls; of the slowest."""
        self.end = math.inf
        """By `time.perf_counter`: nothing begins that would pass it."""

    def __call__(self, calls: dict[str, Thunk]) -> dict[str, Timing]:
        """Each call once to warm up, once to time it, then in turns.

        There are 1 to MOST turns, as many as the budget allows. The clock is looked at before each,
        and what comes next is taken to last as long as what came last: a machine may get slower.

        Raises:
            OutOfTime: not even one turn would end before `end`.
        """
        began, last = time.perf_counter(), 0.0
        for call in calls.values():
            last = max(last, self._seconds(call, last))
        warm = time.perf_counter() - began
        turns = [self._turn(calls, warm)]
        first = time.perf_counter()
        self.once = last = max(first - began - warm, 1e-6)
        while len(turns) < MOST:
            now = time.perf_counter()
            if now + last > min(first + self.budget, self.end):
                break
            turns.append(self._turn(calls, last))
            last = time.perf_counter() - now
            self.once = max(self.once, last)
        return {
            name: Timing(*(statistics.median(turn[name][i] for turn in turns) for i in (0, 1)))
            for name in calls
        }

    def check(self, seconds: float) -> None:
        """Raise OutOfTime where what takes so long would not end in time."""
        if time.perf_counter() + seconds > self.end:
            raise OutOfTime

    def _turn(self, calls: dict[str, Thunk], expected: float) -> dict[str, Timing]:
        self.check(expected)
        return {name: read_call(call, self.device, self.now) for name, call in calls.items()}

    def _seconds(self, call: Thunk, expected: float) -> float:
        self.check(expected)
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


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
