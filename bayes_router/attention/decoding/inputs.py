"""What a cache is handed: checked, and each fault named with its remedy."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.shapes import fits_units, with_units


def check_tensor(name: str, x: object, dims: int | None = None) -> None:
    """Raise a ValueError unless x is a tensor, of so many dimensions if they are given."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor; got {type(x).__name__}")
    if dims is not None and x.dim() != dims:
        raise ValueError(
            f"{name}: expected {dims} dimensions [B, H, T, Dh]; got shape {tuple(x.shape)}"
        )


def hard_choices(q: Tensor, route: Tensor | int, experts: int, num_kv_heads: int) -> Tensor:
    """[B, T, R] hard choices; zeros for a soft route of the right shape."""
    B, H, T, _ = q.shape
    if isinstance(route, int):
        if not 0 <= route < experts:
            raise ValueError(f"route: expected values in 0..{experts - 1}; got {route}")
        return torch.full((B, T, 1), route, device=q.device)
    check_tensor("route", route)
    if not route.is_floating_point():
        return with_units(route)
    soft = with_units(route)
    fits = (
        soft.dim() == 4
        and tuple(soft.shape) == (B, T, soft.shape[2], experts)
        and fits_units(soft.shape[2], H, num_kv_heads)
    )
    if not fits:
        raise ValueError(
            f"route: expected [B, T, R] or [B, T, R, {experts}], R units of the heads (or "
            f"neither R); "
            f"got shape {tuple(route.shape)}"
        )
    return torch.zeros(soft.shape[:3], dtype=torch.int64, device=route.device)


def described(experts: Iterable[object]) -> str:
    """Names and sizes, for a message."""
    return (
        "("
        + ", ".join(
            f"{e.name} {tuple(e.shape)}" if isinstance(e, Expert) else repr(e) for e in experts
        )
        + ")"
    )
