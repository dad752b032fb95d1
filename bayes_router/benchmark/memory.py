"""Peak memory of one attention call, inputs not counted.

By torch's allocator on CUDA, by a fresh process on the CPU.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bayes_router.attention.hard.dispatch import EXPERTS, routed_attention

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

WARM = 256  # tokens of a first call that is not measured


def peak_bytes(
    kind: str | Sequence[float],
    T: int,
    H: int,
    Dh: int,
    window: int,
    *,
    training: bool,
    device: torch.device,
    patience: float | None = None,
) -> int:
    """Peak bytes of one expert by name, or of a route drawn with these shares of the three.

    With its backward pass if `training`.

    Raises:
        TimeoutError: on a CPU, it took longer than `patience` seconds.
        RuntimeError: on a CPU, the process ended before it had an answer.
    """
    arguments = (kind, T, H, Dh, window, training)
    if device.type == "cuda":
        return _peak(*arguments, device)
    fresh = multiprocessing.get_context("spawn")
    receiver, sender = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_send_peak, args=(sender, *arguments, device), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            raise TimeoutError(f"peak memory: expected within {patience:.0f} s")
        return int(receiver.recv())
    except EOFError:
        raise RuntimeError(f"peak memory of {kind} at {T} tokens: its process ended") from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send_peak(sender: Connection, *arguments: Any) -> None:
    sender.send(_peak(*arguments))


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that a call adds to what is in use.

    Exact on CUDA, on a CPU only in a process that did nothing before it.

    Raises:
        ValueError: a CPU on a system that keeps no peak for a process.
    """
    before = _start(device)
    call()
    return _read(device) - before


def measurable(device: torch.device) -> bool:
    """Whether this system tells the peak: CUDA anywhere, a CPU on Linux."""
    return device.type == "cuda" or CLEAR.exists()


def _peak(
    kind: str | Sequence[float],
    T: int,
    H: int,
    Dh: int,
    window: int,
    training: bool,
    device: torch.device,
) -> int:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if T > WARM:  # code is loaded into memory too, once for a process, whatever it computes
        _peak(kind, WARM, H, Dh, window, training, device)
    q, k, v = (
        torch.randn(1, T, H, Dh, device=device, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_(training)
        for _ in range(3)
    )
    gradient = torch.randn_like(q)
    route = (
        EXPERTS.index(kind)
        if isinstance(kind, str)
        else torch.multinomial(torch.tensor(kind), T, True)[None].to(device)
    )

    def call() -> None:
        with torch.set_grad_enabled(training):
            out = routed_attention(q, k, v, route, window=window)
        if training:
            torch.autograd.grad(out, (q, k, v), gradient)

    return peak_of(call, device)


def _start(device: torch.device) -> int:
    """Forget the peak so far; what is in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not CLEAR.exists():
        raise ValueError(
            f"peak memory: expected Linux, which keeps {STATUS}; this system has none; measure on "
            f"CUDA or Linux"
        )
    CLEAR.write_text("5")  # the high-water mark starts again
    return _read(device)


def _read(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
