"""What a token costs in nats: the one formula that training, evaluation and diagnostics read."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.types import IGNORED

ROWS = 512  # of a vocabulary in float32 at once


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of every token, nats.

    logits [..., V], targets int64 [...] -> [...], at least float32; 0 where IGNORED.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    flat = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape)


def token_kl(reference: Tensor, routed: Tensor) -> Tensor:
    """KL(reference || routed) of two predictions by logits [..., V], nats, [...]; no gradient.

    A few rows of the vocabulary at once.
    """
    pairs = zip(*(x.detach().flatten(0, -2).split(ROWS) for x in (reference, routed)), strict=True)
    logs = ((p.float().log_softmax(-1), q.float().log_softmax(-1)) for p, q in pairs)
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in logs])
    return kl.view(reference.shape[:-1]).clamp_min(0)


def mean_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per scored token."""
    return token_nll(logits, targets).sum() / (targets != IGNORED).sum()
