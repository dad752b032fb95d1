"""What times and peaks are compared with: the fastest full attention, and a shorter text."""

import math
from collections.abc import Iterator
from typing import Any

from bayes_router.timing import Timing

GRAPH = "graph "
"""Begins the name of a variant that is replayed from a CUDA graph."""


def doubling(before: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, float]:
    """Growth of time and memory since a shorter text of the same heads, for twice the tokens.

    2 is linear.
    """
    if (
        before is None
        or before["T"] >= row["T"]
        or any(before[key] != row[key] for key in ("B", "H", "Dh"))
    ):
        return {}
    power = 1 / math.log2(row["T"] / before["T"])
    pairs = {"time_growth": "ms", "memory_growth": "peak_mib"}
    return {
        name: (row[key] / before[key]) ** power
        for name, key in pairs.items()
        if row.get(key) and before.get(key)
    }


def compared(
    times: dict[str, Timing], peaks: dict[str, float], **facts: Any
) -> Iterator[dict[str, Any]]:
    """One row a variant, with its speed-up over the fastest full attention, graphs over graphs."""
    for name, (ms, wall_ms) in times.items():
        prefix = GRAPH if name.startswith(GRAPH) else ""
        rivals = [timing for other, timing in times.items() if other.startswith(f"{prefix}full")]
        speedup = min(rival.ms for rival in rivals) / ms
        row = {**facts, "variant": name, "ms": ms, "wall_ms": wall_ms, "speedup": speedup}
        row["wall_speedup"] = min(rival.wall_ms for rival in rivals) / wall_ms
        routed = not name.startswith(f"{prefix}full")
        row |= {
            "ideal": facts["ideal"] if routed else None,
            "share": speedup / facts["ideal"] if routed else None,
        }
        yield {**row, "peak_mib": peaks.get(name)}
