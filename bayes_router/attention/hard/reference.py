"""The backend `reference`, the oracle: each expert as its formula, token by token, in float64.

Slow on purpose; tests compare everything with it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.experts.contract import Kernel
from bayes_router.attention.hard.backend import register_backend
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels.eager.chunks import EPSILON
from bayes_router.attention.shapes import repeat_heads


def visible(num_queries: int, num_keys: int, window: int | None = None, sinks: int = 0) -> Tensor:
    """[Tq, Tk] bool: whether query t, of the last Tq of Tk positions, sees key s.

    It does if s <= t, and t - s < window or s < sinks.
    """
    t = torch.arange(num_keys - num_queries, num_keys)[:, None]
    s = torch.arange(num_keys)[None]
    return (s <= t) & ((t - s < (window or num_keys + 1)) | (s < sinks))


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, sinks: int = 0
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v over visible keys.

    q [B, H, Tq, Dh], k and v [B, Hkv, Tk, Dh] -> [B, H, Tq, Dh].
    """
    k, v = (repeat_heads(x, q.shape[1]).double() for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = visible(q.shape[2], k.shape[2], window, sinks).to(q.device)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor, epsilon: float = EPSILON) -> Tensor:
    """sum_s phi(q_t) phi(k_s) v_s / (sum_s phi(q_t) phi(k_s) + epsilon) over s <= t, phi = elu + 1.

    Shapes as above.
    """
    k, v = (repeat_heads(x, q.shape[1]).double() for x in (k, v))
    phi_q, phi_k = F.elu(q.double()) + 1, F.elu(k) + 1
    weights = (phi_q @ phi_k.transpose(-1, -2)).masked_fill(
        ~visible(q.shape[2], k.shape[2]).to(q.device), 0.0
    )
    return weights @ v / (weights.sum(-1, keepdim=True) + epsilon)


class _Reference:
    """The float64 oracle, on any device."""

    name = "reference"

    def refuses(self, problem: RoutedProblem) -> str | None:
        """It refuses nothing."""
        return None

    def attend(self, problem: RoutedProblem) -> Tensor:
        """See `Backend.attend`; one row of the batch after another."""
        problem.assert_route()
        return problem.stack([_one(one) for one in problem.sequences()])


def _one(one: RoutedProblem) -> Tensor:
    """Each expert of a plain kernel by its formula, any other by its own dense pass; B = 1."""
    out = torch.zeros_like(one.q)
    for index, expert in one.computed():
        q, k, v = one.inputs(expert)
        if expert.kernel is Kernel.FULL:
            dense = softmax_attention(q, k, v)
        elif expert.kernel is Kernel.LOCAL:
            dense = softmax_attention(q, k, v, expert.shape.window, expert.shape.sinks)
        elif expert.kernel is Kernel.LINEAR:
            dense = linear_attention(q, k, v)
        else:
            dense = expert(q, k, v)
        out = torch.where(one.chosen(index), dense.to(out.dtype), out)
    return out


REFERENCE = register_backend(_Reference())
