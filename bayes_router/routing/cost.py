"""What executed routes cost: FLOPs are paid by query head, bytes of a decoding step by key head."""

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor


class CostBy(Enum):
    """Which cost of a route a budget is over."""

    FLOPS = "flops"  # the prior's cost model: every routing unit pays for its own expert
    # keys and values that a decoding step reads: a key head pays for the most that one of its heads
    # reads
    BYTES = "bytes"


def token_cost(route: Tensor, cost: Tensor, sharing: int = 1) -> Tensor:
    """Cost of each token under hard routes: the mean over its units, [..., T].

    Args:
        route: int64 [..., T, R].
        cost: of the experts, [E], or with the leading dimensions of `route` before T, [..., E].
        sharing: neighbouring units that pay together, the most that one of them costs: the query
            heads of a key head, in bytes.
    """
    paid = cost.expand(*route.shape[:-2], -1).flatten(0, -2) if cost.dim() > 1 else cost
    flat = route.reshape(-1, route.shape[-2] * route.shape[-1]) if cost.dim() > 1 else route
    each = (paid.gather(1, flat) if cost.dim() > 1 else paid[flat]).view(route.shape)
    if sharing > 1:
        each = each.unflatten(-1, (-1, sharing)).amax(-1)
    return each.mean(-1)


def counted(cost: Tensor, sharing: int = 1) -> Callable[[Tensor], float]:
    """What hard routes [L, ..., T, R] cost on average.

    `token_cost` of experts that cost `cost`, [E] or [L, E].
    """

    def count(route: Tensor) -> float:
        flat = route.flatten(1, -2)  # [L, N, R]
        return float(token_cost(flat, cost.to(route.device, torch.float64), sharing).mean())

    return count
