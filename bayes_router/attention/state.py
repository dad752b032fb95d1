"""What the experts that keep a state remember of new tokens, where rows end at different tokens: masks, no loop over rows."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.expert import Expert, repeat_heads, segments, widen
from bayes_router.attention.gated import GatedLinearAttention
from bayes_router.attention.linear import LinearAttention, feature_map, with_ones
from bayes_router.attention.mapped import MappedGatedAttention
from bayes_router.attention.problem import RoutedProblem

SUMS = (LinearAttention, GatedLinearAttention, MappedGatedAttention)
"""Experts whose state is a sum of phi(k) v^T, which may fade."""


def extend(expert: Expert, new: RoutedProblem, state: Tensor, empty: bool) -> tuple[Tensor | None, Tensor]:
    """(output of every new token, zero on padding; the state after the real ones) of a stateful expert.

    No output where the state was `empty` and is known without one: any backend computes the pass over a first chunk. With
    padding, an expert of the user's is taken row by row, which reads the lengths on the host; the others wait for nothing.
    """
    q, k, v = new.inputs(expert)
    real = new.real()
    built_in = type(expert) in SUMS
    if built_in and empty:
        return None, _advance(expert, k, v, state, real)
    if real is None or q.shape[2] == 0:
        return expert.extend(q, k, v, state)
    if not built_in:
        return _row_by_row(expert, new, state)
    out = expert.extend(q, k, v, state)[0]  # real tokens come first: none sees padding
    return torch.where(real[:, None, :, None], out, 0.0), _advance(expert, k, v, state, real)


def _advance(expert: Expert, k: Tensor, v: Tensor, state: Tensor, real: Tensor | None) -> Tensor:
    """The state after the tokens k, v [B, Hkv, T, Dh] that are `real` [B, T]: nothing is computed of each token's own."""
    for a, b in segments(k.shape[2], k.device):
        phi_k, value, rest = _entries(expert, k[:, :, a:b], v[:, :, a:b])
        if real is not None:
            mask = real[:, None, a:b, None]
            phi_k, value = torch.where(mask, phi_k, 0.0), torch.where(mask, value, 0.0)
        if rest is not None:
            rest = rest if real is None else torch.where(real[:, None, a:b], rest, 0.0)
            since = rest.flip(-1).cumsum(-1).flip(-1)  # [B, H, T], log of what is kept from before a token to the end
            state = since[..., :1, None].exp() * state
            phi_k = phi_k * F.pad(since[..., 1:], (0, 1)).exp().unsqueeze(-1)
        state = state + phi_k.transpose(-1, -2) @ value
    return state


def _entries(expert: Expert, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features [B, Hs, T, Dh], values with ones [B, Hs, T, Dh + 1], and log gates, if any; of the state's heads Hs."""
    if isinstance(expert, GatedLinearAttention):
        k, v = (repeat_heads(x, expert.shape.num_heads) for x in (k, v))
        return expert._features(k), with_ones(widen(v)), expert._log_gate(k)
    return feature_map(widen(k)), with_ones(widen(v)), None


def _row_by_row(expert: Expert, new: RoutedProblem, state: Tensor) -> tuple[Tensor, Tensor]:
    outs, states = [], []
    for b, one in enumerate(new.sequences()):
        out, after = expert.extend(*one.inputs(expert), state[b : b + 1])
        outs.append(F.pad(out, (0, 0, 0, new.q.shape[2] - out.shape[2])))
        states.append(after)
    return torch.cat(outs), torch.cat(states)
