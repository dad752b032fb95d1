"""Launching Triton kernels with little time on the host.

Triton looks at every argument of every launch to find the compiled kernel, tens of microseconds
each; a routed forward pass has eight launches and takes a fifth of a millisecond at 8192 tokens.
Here arguments that look the same as before (numbers by value, tensors by dtype and alignment, which
is all that Triton specialises on) go straight to the kernel compiled for them.

On Hopper and later the device, too, loses less between kernels (programmatic dependent launch): the
programs of a kernel are placed as those of the kernel before it end, and wait there (`follow`)
until all that stands before it in the stream has been written. Not in a CUDA graph.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

_BESIDE: dict[int, torch.cuda.Stream] = {}  # of each device
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST = 4096
# the calling convention of a compiled kernel is this version's
_DIRECT = triton.__version__.startswith("3.6.")


def _can_follow() -> bool:
    """Whether every device here knows programmatic dependent launch; the interpreter has none."""
    if not _DIRECT or triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    devices = range(torch.cuda.device_count())
    return all(torch.cuda.get_device_capability(device)[0] >= 9 for device in devices)


_FOLLOWS = _can_follow()
FOLLOWS = tl.constexpr(_FOLLOWS)
"""Whether kernels are launched before the one before them has ended."""


@triton.jit
def follow() -> None:
    """The first statement of every kernel that `launch` launches.

    Nothing is read or written before all of the last kernel's is there; whoever waits for it has
    waited for all earlier ones, for so has it. No kernel lets the next one come before its own
    programs end (`gdc_launch_dependents`): what waits would take the room of another stream.
    """
    if FOLLOWS:
        cuda.gdc_wait()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, of a kernel that begins with `follow()`.

    `constants` are its constexpr parameters and the compiler's options.
    """
    if not _DIRECT or not hasattr(kernel, "params"):  # another version, or the interpreter
        kernel[grid](*args, **constants)
        return
    shown = tuple(map(_shown, args))
    key = (kernel, torch.cuda.current_device(), shown, tuple(constants.values()))
    known = _COMPILED.get(key)
    if known is None:
        if len(_COMPILED) >= _MOST:
            _COMPILED.clear()
        compiled = kernel[grid](*args, **constants)
        _COMPILED[key] = compiled, tuple(constants[p.name] for p in kernel.params[len(args) :])
        return
    compiled, rest = known
    if _FOLLOWS:  # in a graph, where no kernel waits for the host, it costs more than it saves
        compiled.run.launch_pdl = not torch.cuda.is_current_stream_capturing()
    compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _shown(x: Any) -> Any:
    """What a kernel is compiled for, of one argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    block = getattr(x, "block_shape", None)  # a descriptor of tiles, always aligned
    return x if block is None else (x.base.dtype, *block)


class Beside:
    """A second stream, for kernels that need nothing of those that run beside them.

    Where it is not `wanted` everything is launched on the current stream, in order. Tensors that
    outlive what `run` launches are made outside it: what it allocates belongs to the second stream.
    """

    def __init__(self, device: torch.device, wanted: bool):
        self.stream: torch.cuda.Stream | None = None
        self._marked = False
        if wanted:
            index = torch.cuda.current_device()
            if index not in _BESIDE:
                _BESIDE[index] = torch.cuda.Stream(device)
            self.main, self.stream = torch.cuda.current_stream(device), _BESIDE[index]

    def mark(self) -> None:
        """What is run from now on waits for no more than was launched so far."""
        if self.stream is not None:
            self.stream.wait_stream(self.main)
            self._marked = True

    def run(self, launches: Callable[[], object]) -> None:
        """Launch on the second stream, behind all that was launched on the current one so far, or
        up to the mark.
        """
        if self.stream is None:
            launches()
            return
        if not self._marked:
            self.stream.wait_stream(self.main)
        with torch.cuda.stream(self.stream):
            launches()

    def join(self) -> None:
        """The current stream waits for all that was run."""
        if self.stream is not None:
            self.main.wait_stream(self.stream)
