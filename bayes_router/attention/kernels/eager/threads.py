"""Pieces of work on threads of ours, each of which computes alone.

An operator of torch that is shared between threads waits for the last of them at its end, spinning.
Where another process has one of the cores, every one of thousands of small operators waits for a
thread that does not run: ten times the time of one thread alone. Here a thread takes whole pieces,
nothing inside of which is shared, and they meet once.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial

import torch

PIECES = 2  # of work for a thread, for some end before others


def parts_of(key_heads: int, texts: int, fits: Callable[[int], bool] = lambda n: True) -> int:
    """Into how many parts the key heads of each of so many texts are cut, so that every thread has
    work: a number that divides them, and `fits`.
    """
    threads = torch.get_num_threads()
    wanted = max(-(-PIECES * threads // max(texts, 1)), 1) if threads > 1 else 1
    numbers = (n for n in range(1, key_heads + 1) if key_heads % n == 0 and fits(n))
    return max(n for n in numbers if n <= wanted)


@lru_cache(maxsize=4)
def pool_of(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that torch leaves alone; of a process, for a fork has none of its parent's."""
    pool = ThreadPoolExecutor(threads, "bayes-router", _alone)
    number, all_begun = torch.get_num_threads(), threading.Barrier(threads)
    # a setting of torch's own is for threads to come as well: it is put back when all have begun
    list(pool.map(lambda _: all_begun.wait(), range(threads)))
    torch.set_num_threads(number)
    return pool


def _alone() -> None:
    torch.get_num_threads()  # first, for it would take the setting of the process
    torch.set_num_threads(1)


def in_threads(pieces: Sequence[Callable[[], None]]) -> None:
    """Run the pieces, which write to different places; errors are those of the first that fails.

    In the calling thread, one by one, where torch may use one thread, is traced or watched. Grad
    mode, inference mode and autocast are the caller's.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    watched = torch._C._len_torch_dispatch_stack() > 0  # a mode sees its own thread alone
    if threads < 2 or watched or torch.compiler.is_compiling():
        for piece in pieces:
            piece()
        return
    modes = partial(
        _modes,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )

    def run(piece: Callable[[], None]) -> None:
        with modes():
            piece()

    list(pool_of(torch.get_num_threads(), os.getpid()).map(run, pieces))


@contextmanager
def _modes(grad: bool, inference: bool, autocast: bool, dtype: torch.dtype) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        if autocast:
            stack.enter_context(torch.autocast("cpu", dtype))
        yield
