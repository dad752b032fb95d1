"""Time of each expert on this device.

Measured once, median, kept in a small file in the user's cache directory.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert
from bayes_router.timing import device_name, median_ms


def measured_latencies(
    experts: Sequence[Expert], context: int, device: torch.device | str | None = None
) -> list[float]:
    """Milliseconds of a causal forward pass of each expert over `context` tokens (batch 1).

    They are measured, or read from the cache.

    Experts are timed in turn, so that a drift of the clock touches all. CUDA takes bfloat16, the
    CPU float32.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = cache_path()
    known = _read(path)
    keys = [_key(expert, context, where) for expert in experts]
    if any(key not in known for key in keys):
        known = {**known, **dict(zip(keys, _measure(experts, context, where), strict=True))}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True))
        temporary.replace(path)  # readers never see half a file
    return [known[key] for key in keys]


def cache_path() -> Path:
    """Where latencies are kept: $XDG_CACHE_HOME or ~/.cache, bayes_router/latency.json."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bayes_router" / "latency.json"


def _measure(experts: Sequence[Expert], context: int, device: torch.device) -> list[float]:
    num_heads, head_dim = experts[0].shape[:2]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, num_heads, context, head_dim, device=device, dtype=dtype)

    def run(expert: Expert) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return expert(q, k, v)

        return call

    return median_ms([run(copy.deepcopy(expert).to(device)) for expert in experts], device)


def _key(expert: Expert, context: int, device: torch.device) -> str:
    kind = type(expert)
    clock = " (busy stream)" if device.type == "cuda" else ""
    parts = (
        f"{device_name(device)}{clock}",
        torch.__version__,
        f"{kind.__module__}.{kind.__qualname__}",
        *expert.shape,
        context,
    )
    return " | ".join(map(str, parts))


def _read(path: Path) -> dict[str, float]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):  # absent, or damaged: measure again
        return {}
