"""Work in steps, on as many threads of torch as run undisturbed.

An operator that is shared between threads ends when the last of them does, and the others wait,
spinning. Where another process has one of the cores, each of thousands of small operators waits for
a thread that does not run: many times the time of one thread alone. How often the system took a
core from this process is one cheap call. Where that is often, work goes on with half the threads,
between two operators of the same pass; after a while of quiet it tries twice as many.
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

OFTEN, WITHIN = 11, 0.1
"""Times that this process is preempted in so many seconds, from which on more threads do not pay:
beside one busy process it is 12 and more (Linux), beside daemons 3, and seldom up to 9."""
LATER = 0.05
"""Seconds of a pass on fewer threads until threads to come are seen to."""
QUIET, LONGEST = 0.25, 4.0
"""Seconds without that until more threads are tried, at first and at most: each try that fails
doubles them."""
Returned = TypeVar("Returned")
Steps = Generator[None, None, Returned]
"""Work that may go on with another number of threads wherever it yields."""


KNOWN = resource is not None and platform.system() == "Linux"
"""Whether the system's count says what is asked; elsewhere nothing disturbs."""


def preemptions() -> int:
    """How often the system took a core from a thread of this process that wanted to go on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if KNOWN else 0


class Load:
    """How many threads run undisturbed, by the system's count of preemptions."""

    def __init__(
        self,
        preempted: Callable[[], int] = preemptions,
        now: Callable[[], float] = time.monotonic,
    ):
        self._preempted, self._now = preempted, now
        self._since, self._seen = now(), preempted()
        self._halved, self._tried, self._quiet, self._until = 0, False, QUIET, 0.0

    def threads(self, most: int) -> int:
        """Of at most so many, the number to work with now."""
        now, seen = self._now(), self._preempted()
        passed = now - self._since
        often = seen - self._seen >= OFTEN * max(passed / WITHIN, 1.0)
        if often or passed > WITHIN or now > self._until:
            self._since, self._seen = now, seen
        if often:
            self._halved = min(self._halved + 1, most.bit_length() - 1)
            self._quiet = min(2 * self._quiet, LONGEST) if self._tried else self._quiet
            self._tried, self._until = False, now + self._quiet
        elif now > self._until:
            self._quiet = self._quiet if self._halved else QUIET
            self._tried, self._halved = self._halved > 0, max(self._halved - 1, 0)
            self._until = now + self._quiet
        return max(most >> self._halved, 1)


LOAD = Load()
_HERE = threading.local()


def run(steps: Steps[Returned]) -> Returned:
    """Take all steps, each with as many threads as run undisturbed then.

    With all where torch may use one alone, is traced or watched, and inside other steps. Some
    products round otherwise by another number of threads, so that a pass for gradients, which has
    to be repeated to the bit, calls `rest`. What the steps return.
    """
    most = number = torch.get_num_threads()
    watched = torch._C._len_torch_dispatch_stack() > 0  # or operators are counted
    if most < 2 or watched or torch.compiler.is_compiling() or getattr(_HERE, "runs", False):
        return rest(steps)
    _HERE.runs = True
    since = float("inf")  # from when on threads to come have fewer
    try:
        while True:
            wanted = LOAD.threads(most)
            if wanted != number:
                number = wanted
                torch.set_num_threads(number)
                since = time.monotonic() if number != most else float("inf")
            elif time.monotonic() - since > LATER:
                _give_back(most)
                since = float("inf")
            next(steps)
    except StopIteration as end:
        found: Returned = end.value
        return found
    finally:
        _HERE.runs = False
        if number != most:
            torch.set_num_threads(most)


def rest(steps: Steps[Returned]) -> Returned:
    """Take all steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Returned = end.value
            return found


def _give_back(most: int) -> None:
    """Let threads to come share operators between so many again.

    A setting of torch's is of the thread that makes it and of threads to come. These get theirs
    back at the end of a pass, or in a long one from another thread that makes it: beside a busy
    process that thread waits for a core, as long as a short pass takes.
    """
    _other(os.getpid()).submit(torch.set_num_threads, most)


@lru_cache(maxsize=1)
def _other(process: int) -> ThreadPoolExecutor:
    """A thread that computes nothing; of a process, for a fork has none of its parent's."""
    return ThreadPoolExecutor(1, "bayes-router")
