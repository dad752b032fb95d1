"""Was this text read before?

A sketch of a text that knows its own passages again and gives none of them away.

Every 16 neighbouring tokens have a hash; the sketch keeps the smallest of all. Text of which
passages were in the first shows the same numbers below the largest that was kept; other text shows
others.
"""

from collections.abc import Collection

import torch
from torch import Tensor

LENGTH, KEPT, AT_A_TIME = 16, 2048, 1 << 18
FACTOR, MIX = 0x5851F42D4C957F2D, 0x2545F4914F6CDD1D
LEAST_SEEN = 3  # passages: fewer may be quotations


def fingerprint(tokens: Tensor, kept: int = KEPT) -> tuple[int, ...]:
    """The `kept` smallest hashes of token ids [N], ascending.

    A text shorter than a passage has none.
    """
    found = torch.empty(0, dtype=torch.int64)
    for start in range(0, len(tokens) - LENGTH + 1, AT_A_TIME):
        part = tokens[start : start + AT_A_TIME + LENGTH - 1].to("cpu", torch.int64)
        found = torch.cat([found, _hashes(part)]).unique()[:kept]
    return tuple(found.tolist())


def seen_before(tokens: Tensor, sketch: Collection[int]) -> float:
    """About which share of the passages of token ids [N] are in the text that `sketch` is the
    fingerprint of.
    """
    if not sketch or len(tokens) < LENGTH:
        return 0.0
    hashes = _hashes(tokens.to("cpu", torch.int64)).unique()
    comparable = hashes[hashes <= max(sketch)].tolist()
    known = set(sketch)
    common = sum(one in known for one in comparable)
    return common / len(comparable) if common >= LEAST_SEEN else 0.0


def _hashes(tokens: Tensor) -> Tensor:
    """Of every passage, int64 [N - 15]; products wrap around."""
    found = torch.zeros(max(len(tokens) - LENGTH + 1, 0), dtype=torch.int64)
    for i in range(LENGTH):
        found = found * FACTOR + tokens[i : len(tokens) - LENGTH + 1 + i] + 1
    found = (found ^ (found >> 29)) * MIX
    return (found ^ (found >> 32)) * FACTOR
