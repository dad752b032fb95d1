"""Time of a call on a device, read alone and in a busy stream.

Calls that are compared take turns.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

CPUINFO = Path("/proc/cpuinfo")
REPEATS = 7
# of a GPU's clock, at most: at a lower clock the sleep before a reading is longer
CYCLES_PER_MS = 2_000_000
MAX_SLEEP_MS = 50.0


def device_name(device: torch.device) -> str:
    """The name that a timing belongs to; of a CPU the processor's, and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _processor() if device.type == "cpu" else device.type
    return f"{name}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, models), "") or platform.processor() or platform.machine() or "cpu"


class Timing(NamedTuple):
    """Milliseconds of a call, or of the median of several."""

    # device time in a stream that has work before the call, as inside a model; on a CPU the same as
    # wall
    ms: float
    # an isolated call, the device idle before it and waited for after it: launches included
    wall_ms: float


def read_call(
    call: Callable[[], object], device: torch.device, now: Callable[[], float] = time.perf_counter
) -> Timing:
    """Time a call twice on CUDA, alone and in a busy stream.

    Once elsewhere, by the clock `now` in seconds.
    """
    queued, wall = isolated_ms(call, device, now)
    if device.type != "cuda":
        return Timing(wall, wall)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # the device sleeps while the host enqueues the call, so that it never waits for a launch inside
    # it
    torch.cuda._sleep(int(min(1.5 * queued + 0.2, MAX_SLEEP_MS) * CYCLES_PER_MS))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return Timing(begin.elapsed_time(end), wall)


def isolated_ms(
    call: Callable[[], object], device: torch.device, now: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """(milliseconds until the host has enqueued the call, until the device has done it).

    The device is idle before.
    """
    _wait(device)
    start = now()
    call()
    queued = now() - start
    _wait(device)
    return queued * 1e3, (now() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(
    calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = REPEATS
) -> list[float]:
    """Median milliseconds of each call as inside a model (`Timing.ms`), the calls taking turns."""
    for call in calls:
        read_call(call, device)  # first calls compile and allocate
    rounds = [[read_call(call, device).ms for call in calls] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
