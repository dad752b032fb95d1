"""Was this text read before?

A sketch of a text that knows its own passages again and gives none of them away.

Every `length` neighbouring tokens have a hash; the sketch keeps the smallest of all. Text of which
passages were in the first shows the same numbers below the largest that was kept; other text shows
others. Words of one text stand in others too, so that a passage has to be longer than they are: 16
tokens, or 64 where a token is a byte.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from bayes_router.checks import require

LENGTH, BYTES, KEPT, AT_A_TIME = 16, 64, 2048, 1 << 18
EVERY, MOST_KEPT = 512, 1 << 16
"""One passage of so many is kept of a long text, so that some thousand tokens of it are known
again; at most so many in all."""
FACTOR, MIX = 0x5851F42D4C957F2D, 0x2545F4914F6CDD1D
LEAST_SEEN = 3  # passages: fewer may be quotations
MOST_SEEN = 0.1
"""Share of calibration text that may be known from the fit: quotations and what all texts share."""


def passage_of(vocab_size: int) -> int:
    """Tokens of a passage, for a vocabulary."""
    return BYTES if vocab_size <= 256 else LENGTH


def fingerprint(tokens: Tensor, kept: int | None = None, length: int = LENGTH) -> tuple[int, ...]:
    """The `kept` smallest hashes of token ids [N], ascending; () of less than a passage.

    `length` is a power of two. By default a long text keeps one in `EVERY`, a short one `KEPT`.
    """
    kept = min(max(KEPT, len(tokens) // EVERY), MOST_KEPT) if kept is None else kept
    found = torch.empty(0, dtype=torch.int64)
    for start in range(0, len(tokens) - length + 1, AT_A_TIME):
        part = tokens[start : start + AT_A_TIME + length - 1].to("cpu", torch.int64)
        hashes = _hashes(part, length)
        if len(found) == kept:
            hashes = hashes[hashes < found[-1]]
        found = torch.cat([found, hashes]).unique()[:kept]
    return tuple(found.tolist())


def seen_before(tokens: Tensor, sketch: Collection[int], length: int = LENGTH) -> float:
    """About which share of the passages of token ids [N] are in the text that `sketch` is the
    fingerprint of.
    """
    if not sketch or len(tokens) < length:
        return 0.0
    hashes = _hashes(tokens.to("cpu", torch.int64), length).unique()
    comparable = hashes[hashes <= max(sketch)].tolist()
    known = set(sketch)
    common = sum(one in known for one in comparable)
    return common / len(comparable) if common >= LEAST_SEEN else 0.0


def require_unseen(tokens: Tensor, sketch: Collection[int], fix: str, length: int = LENGTH) -> None:
    """ValueError where more than `MOST_SEEN` of calibration text is in what a fit read."""
    seen = seen_before(tokens, sketch, length)
    require(
        seen < MOST_SEEN,
        "texts",
        "text that fit did not read: a promise from it would be too good",
        f"text of which about {seen:.0%} was fitted on",
        fix,
    )


def _hashes(tokens: Tensor, length: int) -> Tensor:
    """Of every passage, int64 [N - length + 1], a polynomial in the tokens; products wrap around.

    That of two neighbouring halves is made from theirs.
    """
    if len(tokens) < length:
        return torch.zeros(0, dtype=torch.int64)
    found, factor, half = tokens + 1, FACTOR, 1
    while half < length:
        found = found[:-half] * factor + found[half:]
        factor, half = _wrapped(factor * factor), 2 * half
    found = (found ^ (found >> 29)) * MIX
    return (found ^ (found >> 32)) * FACTOR


def _wrapped(x: int) -> int:
    """As int64 has it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
