"""How often a call makes the host wait for the device."""

import warnings
from collections.abc import Callable
from typing import Any

import torch


def waits(run: Callable[[], Any]) -> int:
    """Synchronising operations of a second call; the first loads, compiles and keeps constants."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
