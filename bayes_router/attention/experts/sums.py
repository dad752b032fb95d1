"""Experts whose past is a sum: what a token adds to the state, and the state after many."""

from typing import ClassVar

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.kernels.eager.chunks import end_state
from bayes_router.attention.shapes import segments


class SumExpert(Expert):
    """An expert whose state is the sum of phi(k) v^T over the past.

    Each term may fade from token to token.
    """

    rotary: ClassVar[bool] = False
    stateful: ClassVar[bool] = True

    def entries(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What tokens add to the state, by head of the state.

        Features [B, Hs, T, Dh], values with ones [B, Hs, T, Dh + 1], log gates.

        Log gates [B, Hs, T] are the logarithms of what is kept of the state before each token; None
        where nothing fades.
        """
        raise NotImplementedError


def advance(expert: SumExpert, k: Tensor, v: Tensor, state: Tensor, real: Tensor | None) -> Tensor:
    """The state after the tokens k, v [B, Hkv, T, Dh] that are `real` [B, T].

    Nothing is computed of each token's own.
    """
    for a, b in segments(k.shape[2], k.device):
        phi_k, value, rest = expert.entries(k[:, :, a:b], v[:, :, a:b])
        if real is not None:
            mask = real[:, None, a:b, None]
            phi_k, value = torch.where(mask, phi_k, 0.0), torch.where(mask, value, 0.0)
        if rest is not None:
            rest = rest if real is None else torch.where(real[:, None, a:b], rest, 0.0)
        state = end_state(phi_k, value, rest, state)
    return state
