"""Linear attention in chunks: feature map, values with their normaliser, and states under decay."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.shapes import repeat_heads

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


def normalised(summed: Tensor) -> Tensor:
    """[..., Dh + 1] -> [..., Dh]: the sum of weighted values over that of the weights."""
    return summed[..., :-1] / (summed[..., -1:] + EPSILON)


def end_state(
    phi_k: Tensor, value: Tensor, log_decay: Tensor | None, state: Tensor | None = None
) -> Tensor:
    """exp(D) state + sum_s exp(D - D_s) phi_k,s value_s^T: the state after T tokens, [..., F, D].

    D_s is the sum of log_decay [..., T] up to s and D all of it, 0 where nothing fades. phi_k
    [..., T, F], value [..., T, D]; `state` is what stands before them (default: nothing). Nothing
    is computed of each token's own.
    """
    if log_decay is not None:
        # log of what is kept from before each token to the end; summed from there, where it counts
        since = log_decay.flip(-1).cumsum(-1).flip(-1)
        phi_k = phi_k * F.pad(since[..., 1:], (0, 1)).exp().unsqueeze(-1)
        state = state if state is None else since[..., :1, None].exp() * state
    added = phi_k.mT @ value
    return added if state is None else state + added


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, H, N * C, ...] -> [B, H, N, C, ...]."""
    return x.unflatten(2, (-1, chunk))


def decayed_prefix(entries: Tensor, log_decay: Tensor) -> Tensor:
    """P_n = exp(log_decay_n) P_{n-1} + entries_n in O(N) work.

    entries [..., N, M] and log_decay [..., N] <= 0 -> [..., N, M].

    A short run is one product with a triangle of decays; a longer one is cut into blocks, whose
    ends are such a run again.
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


def causal_sum(
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_{s <= t} exp(D_t - D_s) (phi_q,t . phi_k,s) value_s in chunks, O(T), and the state after.

    D is the cumulative sum of log_decay, or 0. phi_q [B, H, T, F]; phi_k [B, Hk, T, F], value [B,
    Hk, T, D], log_decay [B, Hk, T]; `state` [B, Hk, F, D], what stands before the first token,
    fades like a term (default: nothing). Without a decay each of Hk heads may serve several of H.
    The sums are [B, H, T, D].

    All chunks are computed at once, for every token, and autograd goes backward through them:
    training and prefill of whole layers. `rows_linear` computes the same for a few chosen tokens of
    one sequence: chunk after chunk, in place, in the cache of a processor, with a backward pass
    written by hand. Each is much slower at the other's work, and their sums round differently, so
    that a run of before would not be repeated to the bit. Tests hold both to one oracle.
    """
    H, T = phi_q.shape[1:3]
    chunk = min(CHUNK, T)
    pad = -T % chunk  # padding keeps the state: it adds 0, and its gate is 1
    if pad:
        phi_q, phi_k, value = (F.pad(x, (0, 0, 0, pad)) for x in (phi_q, phi_k, value))
    if state is None:
        state = value.new_zeros(*phi_k.shape[:2], phi_k.shape[3], value.shape[3])
    phi_q, phi_k, value = (in_chunks(x, chunk) for x in (phi_q, phi_k, value))
    if log_decay is None:
        update = phi_k.transpose(-1, -2) @ value  # [B, Hk, N, F, D], what each chunk adds
        states = torch.cat([state.unsqueeze(2), update], 2).cumsum(2)
        phi_k, value, before = (repeat_heads(x, H) for x in (phi_k, value, states[:, :, :-1]))
        out = phi_q @ before + (phi_q @ phi_k.transpose(-1, -2)).tril() @ value
        return out.flatten(2, 3)[:, :, :T], states[:, :, -1]
    # [B, H, N, C]
    decay = in_chunks(F.pad(log_decay, (0, pad)) if pad else log_decay, chunk).cumsum(-1)
    total = decay[..., -1]  # [B, H, N]
    update = (phi_k * (total.unsqueeze(-1) - decay).exp().unsqueeze(-1)).transpose(-1, -2) @ value
    # [B, H, N + 1, F D], the past first
    entries = torch.cat([state.unsqueeze(2), update], 2).flatten(-2)
    states = decayed_prefix(entries, F.pad(total, (1, 0))).unflatten(-1, state.shape[-2:])
    # [B, H, N, C, C], s <= t
    within = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()
    out = (phi_q * decay.exp().unsqueeze(-1)) @ states[:, :, :-1] + (
        phi_q @ phi_k.transpose(-1, -2) * within
    ) @ value
    return out.flatten(2, 3)[:, :, :T], states[:, :, -1]
