"""Rotary positions (Su et al. 2021, arXiv 2104.09864).

The score of a query and a key depends on their distance.
"""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency, each [..., T, Dh / 2], float32.

    The positions are integers [..., T].
    """
    frequency = base ** (
        -torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + Dh / 2) of x [B, H, T, Dh].

    By angles [T, Dh / 2] or [B, T, Dh / 2].
    """
    cos, sin = (a.to(x.dtype) if a.dim() == 2 else a.to(x.dtype).unsqueeze(1) for a in angles)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
