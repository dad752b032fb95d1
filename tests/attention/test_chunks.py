"""Sums over the past in chunks, against the sum written out."""

import pytest
import torch
from torch import Tensor

from bayes_router.attention.kernels.eager.chunks import CHUNK, causal_sum, decayed_prefix


def written_out(phi_q: Tensor, phi_k: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
    """sum_{s <= t} exp(D_t - D_s) (phi_q,t . phi_k,s) value_s, with all pairs at once."""
    until = log_decay.cumsum(-1)
    elapsed = (until[..., :, None] - until[..., None, :]).tril()
    return (phi_q @ phi_k.mT * elapsed.exp()).tril() @ value


@pytest.mark.parametrize("T", [1, 5, CHUNK, 3 * CHUNK, 3 * CHUNK + 7])
@pytest.mark.parametrize("decays", [False, True])
def test_a_causal_sum_has_the_past_and_the_token_itself(T: int, decays: bool) -> None:
    torch.manual_seed(0)
    phi_q, phi_k = torch.rand(2, 2, 3, T, 4, dtype=torch.float64)
    value = torch.randn(2, 3, T, 5, dtype=torch.float64)
    log_decay = -0.1 * torch.rand(2, 3, T, dtype=torch.float64)
    found, _ = causal_sum(phi_q, phi_k, value, log_decay if decays else None)
    nothing_is_forgotten = torch.zeros_like(log_decay)
    wanted = written_out(phi_q, phi_k, value, log_decay if decays else nothing_is_forgotten)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("decays", [False, True])
def test_a_causal_sum_goes_on_from_its_state(decays: bool) -> None:
    torch.manual_seed(0)
    T, cut = 2 * CHUNK + 9, CHUNK + 5
    phi_q, phi_k = torch.rand(2, 2, 3, T, 4, dtype=torch.float64)
    value = torch.randn(2, 3, T, 5, dtype=torch.float64)
    log_decay = -0.1 * torch.rand(2, 3, T, dtype=torch.float64) if decays else None
    whole, after = causal_sum(phi_q, phi_k, value, log_decay)
    state, parts = None, []
    for part in (slice(0, cut), slice(cut, T)):
        decay = None if log_decay is None else log_decay[..., part]
        found, state = causal_sum(
            phi_q[..., part, :], phi_k[..., part, :], value[..., part, :], decay, state
        )
        parts.append(found)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state, after)


@pytest.mark.parametrize("N", [1, CHUNK, CHUNK + 1, CHUNK * CHUNK + 3])
def test_a_decayed_prefix_is_the_recurrence(N: int) -> None:
    torch.manual_seed(0)
    entries = torch.randn(2, N, 3, dtype=torch.float64)
    log_decay = -0.2 * torch.rand(2, N, dtype=torch.float64)
    state, states = torch.zeros(2, 3, dtype=torch.float64), []
    for n in range(N):
        state = state * log_decay[:, n, None].exp() + entries[:, n]
        states.append(state)
    torch.testing.assert_close(decayed_prefix(entries, log_decay), torch.stack(states, 1))
