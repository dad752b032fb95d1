"""Shapes that every mechanism shares: what an expert may know of its heads, and small tensor helpers."""

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


SEGMENT = 2048
"""Tokens that linear and local attention take at a time on a CPU: larger temporaries are paged in anew at every call."""


def segments(length: int, device: torch.device) -> list[tuple[int, int]]:
    """Bounds of the pieces in which `length` tokens are computed one after another: one piece, but for long text on a CPU."""
    size = SEGMENT if device.type == "cpu" else max(length, 1)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def merge_tokens(x: Tensor) -> Tensor:
    """[B, H, T, Dh] -> [B, T, H * Dh]."""
    return x.transpose(1, 2).flatten(2)


def causal_positions(num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the queries (the last of the keys') [Tq, 1] and of the keys [1, Tk]."""
    keys = torch.arange(num_keys, device=device)
    return keys[num_keys - num_queries :, None], keys[None]
