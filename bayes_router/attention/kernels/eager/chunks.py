"""Linear attention in chunks: feature map, values with their normaliser, and states under decay."""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
EPSILON = 1e-6
"""Added to the denominator of linear attention, in every kernel."""


def feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""
    return F.elu(x).add_(1)  # in place: a pass over memory less


def with_ones(v: Tensor) -> Tensor:
    """[..., Dh] -> [..., Dh + 1].

    With a column of ones, numerator and normaliser are one product.
    """
    return F.pad(v, (0, 1), value=1.0)


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, H, N * C, D] -> [B, H, N, C, D]."""
    return x.unflatten(2, (-1, chunk))


def decayed_prefix(entries: Tensor, log_decay: Tensor) -> Tensor:
    """P_n = exp(log_decay_n) P_{n-1} + entries_n in O(N) work.

    entries [..., N, M] and log_decay [..., N] <= 0 -> [..., N, M].

    A short run is one product with a triangle of decays; a longer one is cut into blocks, whose ends are such a run again.
    """
    length = log_decay.shape[-1]
    if length <= CHUNK:
        elapsed = log_decay.cumsum(-1)
        return (elapsed.unsqueeze(-1) - elapsed.unsqueeze(-2)).tril().exp().tril() @ entries
    pad = -length % CHUNK
    blocks = F.pad(entries, (0, 0, 0, pad)).unflatten(-2, (-1, CHUNK))  # [..., K, C, M]
    decays = F.pad(log_decay, (0, pad)).unflatten(-1, (-1, CHUNK))  # [..., K, C]
    inner = decayed_prefix(blocks, decays)
    ends = decayed_prefix(inner[..., -1, :], decays.sum(-1))  # [..., K, M], after each block
    carried = F.pad(ends[..., :-1, :], (0, 0, 1, 0)).unsqueeze(-2)  # before each block
    out = inner + decays.cumsum(-1).exp().unsqueeze(-1) * carried
    return out.flatten(-3, -2)[..., :length, :]


def causal_sum(phi_q: Tensor, phi_k: Tensor, value: Tensor, log_decay: Tensor | None) -> Tensor:
    """sum_{s <= t} exp(D_t - D_s) (phi_q,t . phi_k,s) value_s in chunks, O(T).

    D is the cumulative sum of log_decay, or 0.

    phi_q and phi_k [B, H, T, F], value [B, H, T, D], log_decay [B, H, T] -> [B, H, T, D].
    """
    T = phi_q.shape[2]
    chunk = min(CHUNK, T)
    pad = -T % chunk
    phi_q, phi_k, value = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, chunk)) for x in (phi_q, phi_k, value))
    if log_decay is None:
        added = phi_k.mT @ value  # [B, H, N, F, D], by each chunk
        out = phi_q @ (added.cumsum(2) - added) + (phi_q @ phi_k.mT).tril() @ value
        return out.flatten(2, 3)[:, :, :T]
    elapsed = F.pad(log_decay, (0, pad)).unflatten(2, (-1, chunk)).cumsum(-1)  # [B, H, N, C]
    total = elapsed[..., -1]  # [B, H, N]
    added = (phi_k * (total.unsqueeze(-1) - elapsed).exp().unsqueeze(-1)).mT @ value
    state, states = torch.zeros_like(added[:, :, 0]), []
    for n in range(added.shape[2]):
        states.append(state)
        state = state * total[:, :, n, None, None].exp() + added[:, :, n]
    within = (elapsed.unsqueeze(-1) - elapsed.unsqueeze(-2)).tril().exp().tril()  # [B, H, N, C, C]
    out = (phi_q * elapsed.exp().unsqueeze(-1)) @ torch.stack(states, 2) + (phi_q @ phi_k.mT * within) @ value
    return out.flatten(2, 3)[:, :, :T]
