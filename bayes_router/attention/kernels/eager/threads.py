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
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

OFTEN, WITHIN = 2, 0.05
"""Times that this process is preempted in so many seconds, from which on threads disturb: on a
machine with nothing else to do it is less, beside one busy process 10 and more (Linux)."""
QUIET, LONGEST = 0.25, 4.0
"""Seconds without that until more threads are tried, at first and at most: each try that fails
doubles them."""
Returned = TypeVar("Returned")
Steps = Generator[None, None, Returned]
"""Work that may go on in another thread wherever it yields."""


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
    """Take all steps: in this thread, or where it is disturbed in one that torch gives fewer.

    In this thread too where torch may use one alone, is traced or watched, and inside other steps.
    Inference mode and autocast are the caller's; so are errors. Some products round otherwise by
    another number of threads, so that a pass for gradients, which has to be repeated to the bit,
    calls `rest`. What the steps return.
    """
    most = torch.get_num_threads()
    watched = torch._C._len_torch_dispatch_stack() > 0  # a mode sees its own thread alone
    if most < 2 or watched or torch.compiler.is_compiling() or getattr(_HERE, "runs", False):
        return rest(steps)
    _HERE.runs = True
    try:
        while True:
            number = LOAD.threads(most)
            some = partial(_some, steps, number, most)
            done = some() if number == most else _with(number, some)
            if done:
                return done[0]
    finally:
        _HERE.runs = False


def rest(steps: Steps[Returned]) -> Returned:
    """Take all steps in this thread."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Returned = end.value
            return found


def _some(steps: Steps[Returned], number: int, most: int) -> list[Returned]:
    """Take steps for as long as this is the number of threads to take; what they return at their
    end.
    """
    try:
        next(steps)
        while LOAD.threads(most) == number:
            next(steps)
    except StopIteration as end:
        return [end.value]
    return []


def _with(number: int, call: Callable[[], Returned]) -> Returned:
    """Call in a thread of the calling one's own, to which torch gives so many."""
    modes = partial(
        _modes,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )

    def here() -> Returned:
        _HERE.runs = True
        with modes():
            return call()

    return _worker(number).submit(here).result()


def _worker(number: int) -> ThreadPoolExecutor:
    """A thread with so many of torch's; a fork has none of its parent's."""
    known = _HERE.__dict__.setdefault("workers", {})
    name = number, os.getpid()
    if name not in known:
        pool = known[name] = ThreadPoolExecutor(1, "bayes-router", partial(_given, number))
        before = torch.get_num_threads()
        pool.submit(int).result()
        torch.set_num_threads(before)  # a setting of torch's own is for threads to come as well
    worker: ThreadPoolExecutor = known[name]
    return worker


def _given(number: int) -> None:
    torch.get_num_threads()  # first, for it would take the setting of the process
    torch.set_num_threads(number)


@contextmanager
def _modes(grad: bool, inference: bool, autocast: bool, dtype: torch.dtype) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        if autocast:
            stack.enter_context(torch.autocast("cpu", dtype))
        yield
