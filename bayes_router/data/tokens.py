"""Tokens: tokenisers, and streams of tokens that a language model is trained and scored on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayes_router.data.text import SEPARATOR
from bayes_router.data.tokenisers import Tokeniser, token_dtype


class Batch(NamedTuple):
    """Tokens [B, T] int64, and what follows each.

    Targets [B, T] int64, -100 where nothing is scored (never in text).
    """

    tokens: Tensor
    targets: Tensor


class Windowed(Protocol):
    """What a dial asks of data."""

    def windows(self, context: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The evaluation text in batches of at most `batch_size` rows, always the same.

        At most `limit` tokens of it.
        """


class TokenSource(Windowed, Protocol):
    """What training and evaluation ask of data; the synthetic tasks answer it too."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    def batch(
        self,
        step: int,
        batch_size: int,
        context: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """The training batch of a step, a function of its arguments alone.

        A resumed run goes on bit for bit.

        `batch_size` counts the rows of all ranks together; a rank gets the rows rank, rank +
        world_size, ...
        """


class TokenDataset:
    """Documents as one stream of tokens, two newlines between them; a window may span documents.

    `tokens` [N] is stored as uint8 (a vocabulary of at most 256) or int32; batches are int64, on
    the CPU.
    """

    def __init__(self, documents: Sequence[bytes], tokeniser: Tokeniser, name: str = "text"):
        """Encode `documents`; `name` stands in error messages."""
        self.name = name
        self.vocab_size = tokeniser.vocab_size
        dtype = token_dtype(tokeniser)
        separator = tokeniser.encode(SEPARATOR).astype(dtype)
        pieces: list[npt.NDArray[Any]] = [np.empty(0, dtype)]
        for document in documents:
            pieces += [tokeniser.encode(document).astype(dtype, copy=False), separator]
        self.tokens = torch.from_numpy(np.concatenate(pieces[:-1] or pieces))  # [N]

    def __len__(self) -> int:
        """Number of tokens N."""
        return self.tokens.numel()

    def batch(
        self,
        step: int,
        batch_size: int,
        context: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """Windows from uniform random starts; see `TokenSource.batch`.

        ValueError if the text is too short.
        """
        check_batch(batch_size, rank, world_size)
        self._check_context(context)
        starts = step_rng(seed, step).integers(0, len(self) - context, size=batch_size)[
            rank::world_size
        ]
        return self._windows_at(torch.from_numpy(starts), context)

    def windows(
        self, context: int, batch_size: int, limit: int | None = None, spread: bool = False
    ) -> Iterator[Batch]:
        """Consecutive windows without overlap: each token but the first is a target once.

        The remainder shorter than `context` at the end of the text, and of `limit` (a number of
        targets), is dropped. With `spread` the windows that `limit` leaves lie evenly over the
        whole text, not at its beginning: where documents follow one another, they are of all.
        """
        check_batch(batch_size)
        self._check_context(context)
        available = (len(self) - 1) // context
        count = window_count(available, context, limit)
        places = torch.arange(count) * available // count if spread else torch.arange(count)
        starts = places * context
        return (self._windows_at(part, context) for part in torch.split(starts, batch_size))

    def _windows_at(self, starts: Tensor, context: int) -> Batch:
        index = starts[:, None] + torch.arange(context + 1)  # [B, T + 1]
        window = self.tokens[index].long()
        return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())

    def _check_context(self, context: int) -> None:
        if not 1 <= context < len(self):
            raise ValueError(
                f"context: expected at least 1 and at most {len(self) - 1} for the {len(self)} "
                f"tokens of {self.name!r} (one "
                f"more token than context is needed); got {context}; shorten the context or give "
                f"more text"
            )


@dataclass(frozen=True)
class TextData:
    """A corpus ready to train on, with what identifies it."""

    train: TokenDataset
    valid: TokenDataset
    corpus: str
    sha256: str
    tokeniser: Tokeniser


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The random numbers of a training step.

    The same (seed, step) gives the same ones, whatever was drawn before.
    """
    if seed < 0 or step < 0:
        raise ValueError(
            f"seed, step: expected integers of at least 0; got {seed}, {step}; take non-negative "
            f"ones"
        )
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, step)))


def check_batch(batch_size: int, rank: int = 0, world_size: int = 1) -> None:
    """Raise a ValueError unless a batch of that many rows can be shared out evenly.

    `rank` must be one of the ranks.
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank: expected 0 <= rank < world_size; got {rank} of {world_size}; correct the launch"
        )
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size: expected a positive multiple of world_size {world_size} (it counts the "
            f"rows of all ranks); "
            f"got {batch_size}; round it"
        )


def window_count(available: int, context: int, limit: int | None) -> int:
    """Number of whole windows among `available` within a `limit` in tokens.

    ValueError if not even one fits.
    """
    if limit is not None and limit < context:
        raise ValueError(
            f"limit: expected at least one window of {context} tokens, or None; got {limit}; raise "
            f"it"
        )
    return available if limit is None else min(available, limit // context)
