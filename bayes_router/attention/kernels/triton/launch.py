"""Launching Triton kernels with little time on the host.

Triton looks at every argument of every launch to find the compiled kernel, tens of microseconds
each; a routed forward pass has eight launches and takes a fifth of a millisecond at 8192 tokens.
Here arguments that look the same as before (numbers by value, tensors by dtype and alignment, which
is all that Triton specialises on, and by device, which it refuses if it is the host) go straight to
the kernel compiled for them, tensors as the addresses that were just looked at.

On Hopper and later the device, too, loses less between kernels (programmatic dependent launch): the
programs of a kernel are placed as those of the kernel before it end, and wait there (`follow`)
until all that stands before it in the stream has been written. Not in a CUDA graph.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

_BESIDE: dict[int, torch.cuda.Stream] = {}  # of each device
_MOST = 4096
_NUMBERS = frozenset((bool, int, float))
# the calling convention of a compiled kernel is this version's
_DIRECT = triton.__version__.startswith("3.6.")


class _Compiled(NamedTuple):
    """A compiled kernel, its constants behind the arguments, and whether it takes no scratch."""

    kernel: Any
    constants: tuple[Any, ...]
    lean: bool


_COMPILED: dict[tuple[Any, ...], _Compiled] = {}


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
    shown, passed = [*args], [*args]  # what a kernel is compiled for, and what it gets
    for i, x in enumerate(args):
        if type(x) in _NUMBERS:
            continue
        if isinstance(x, Tensor):
            passed[i] = x.data_ptr()
            shown[i] = x.dtype, passed[i] % 16, x.get_device()
        elif hasattr(x, "block_shape"):  # a descriptor of tiles, always aligned
            shown[i] = x.base.dtype, *x.block_shape
    device = torch.cuda.current_device()
    # a kernel's own hash takes a lock
    key = (id(kernel), device, tuple(shown), tuple(constants.values()))
    known = _COMPILED.get(key)
    if known is None:
        if len(_COMPILED) >= _MOST:
            _COMPILED.clear()
        compiled = kernel[grid](*args, **constants)
        behind = tuple(constants[p.name] for p in kernel.params[len(args) :])
        _COMPILED[key] = _Compiled(compiled, behind, _is_lean(compiled.run))
        return
    compiled, run = known.kernel, known.kernel.run
    # in a graph, where no kernel waits for the host, it costs more than it saves
    follows = _FOLLOWS and not torch.cuda.is_current_stream_capturing()
    if not known.lean or _watched():
        run.launch_pdl = follows
        compiled[(*grid, 1, 1)[:3]](*args, *known.constants)
        return
    begin, stream = run.launch, triton.runtime.driver.active.get_current_stream(device)
    begin(
        *(*grid, 1, 1)[:3], stream, compiled.function, False, follows, None, None,
        compiled.packed_metadata, None, None, None, *passed, *known.constants,
    )  # fmt: skip


def _is_lean(run: Any) -> bool:
    """Whether a compiled kernel needs no scratch memory, and no cooperative grid."""
    return not (run.global_scratch_size or run.profile_scratch_size or run.launch_cooperative_grid)


def _watched() -> bool:
    """Whether a profiler of Triton's hooks into launches."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


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
