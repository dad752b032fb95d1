"""What a token costs in nats: the one formula that training, evaluation and diagnostics read."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.types import IGNORED


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of every token, nats.

    logits [..., V], targets int64 [...] -> [...], at least float32; 0 where IGNORED.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    flat = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape)


def mean_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per scored token."""
    return token_nll(logits, targets).sum() / (targets != IGNORED).sum()
