"""Processes that compute beside a measurement, as data workers and other models do."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SETTLED = 0.5  # seconds until a started process computes


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """So many processes that do nothing but compute, until the context is left."""
    busy = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(busy) for _ in range(number)]
    try:
        time.sleep(SETTLED if started else 0.0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
