"""Shapes that every mechanism shares.

What an expert may know of its heads, and small tensor helpers.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertShape(NamedTuple):
    """What an expert may know when it is built."""

    num_heads: int
    head_dim: int
    window: int
    sinks: int = 0  # first keys that `local` never loses


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, Hkv, ...] -> [B, H, ...]: each key head serves H / Hkv consecutive query heads."""
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def widen(x: Tensor) -> Tensor:
    """At least float32: sums over the past are not kept in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def with_units(route: Tensor) -> Tensor:
    """A route with its unit dimension, hard [B, T, R] or soft [B, T, R, E].

    Without one, [B, T] or [B, T, E], R = 1.
    """
    return route.unsqueeze(2) if route.dim() == (3 if route.is_floating_point() else 2) else route


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """What is known of each unit, [B, T, R], of each query head.

    [B, H, T, 1], or [B, 1, T, 1] for one unit.
    """
    units = x.shape[2]
    x = x.transpose(1, 2).unsqueeze(-1)
    return x if units == 1 else x.repeat_interleave(num_heads // units, dim=1)


def unit_heads(units: int, num_heads: int, num_kv_heads: int) -> list[tuple[slice, slice]]:
    """The query heads and the key heads of each routing unit, neighbours of one another."""
    size, group = num_heads // units, num_heads // num_kv_heads
    starts = range(0, num_heads, size)
    return [(slice(a, a + size), slice(a // group, (a + size - 1) // group + 1)) for a in starts]


def fits_units(units: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether R units cut the heads evenly, each into whole key heads or a part of one."""
    return (
        1 <= units <= num_heads
        and num_heads % units == 0
        and (num_kv_heads % units == 0 or units % num_kv_heads == 0)
    )


SEGMENT = 2048
"""Tokens that linear and local attention take at a time on a CPU: larger temporaries are paged in
anew at every call."""


def segments(length: int, device: torch.device) -> list[tuple[int, int]]:
    """Bounds of the pieces in which `length` tokens are computed one after another.

    One piece, but for long text on a CPU.
    """
    size = SEGMENT if device.type == "cpu" else max(length, 1)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def merge_tokens(x: Tensor) -> Tensor:
    """[B, H, T, Dh] -> [B, T, H * Dh]."""
    return x.transpose(1, 2).flatten(2)


def causal_positions(
    num_queries: int, num_keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of the queries (the last of the keys') [Tq, 1] and of the keys [1, Tk]."""
    keys = torch.arange(num_keys, device=device)
    return keys[num_keys - num_queries :, None], keys[None]
