"""Associative recall: a synthetic task in which the best route of each token is known.

A sequence of T + 1 tokens, of which the last is only a target:

    k1 v1 k2 v2 ... | a b a b a b ... | ? k7 v7 | c d c d c | ? k2 v2 | e f ...
    pairs             filler            query     filler      query

After a query token (the key behind the mark `?`) comes the value that was paired with the key at
the start. It lies at least `distance` tokens back, so no stack of local layers that reaches less
far can know it, and there are more pairs than a small linear state keeps apart: query tokens need
`full`. No key is asked twice, so an answer is never copied from nearby. Filler alternates between
two random tokens, so the next one is the previous one: `local` suffices.

Scored are what can be known: the answer to each query, and the filler once its two tokens were
seen. All other targets are IGNORED (-100): the pairs, the mark, the queried key and the start of a
filler run are random.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bayes_router.data.tokens import Batch, check_batch, step_rng, window_count
from bayes_router.types import IGNORED

MARK = 0
"""The token that announces a query."""


class RecallBatch(Batch):
    """A batch of recall: unpacks as tokens and targets, and knows its queries."""

    __slots__ = ()

    @property
    def is_query(self) -> Tensor:
        """Bool [B, T]: the queried keys, whose target is the answer."""
        is_query = torch.zeros_like(self.tokens, dtype=torch.bool)
        is_query[:, 1:] = self.tokens[:, :-1] == MARK
        return is_query


@dataclass(frozen=True)
class RecallData:
    """The generator, a `TokenSource` with endless training batches.

    Evaluation reads `num_windows` fixed sequences.

    Vocabulary, in this order: the mark, `num_keys` keys, `num_values` values, `num_fillers` filler
    tokens.

    Args:
        num_pairs: pairs a sequence, their keys distinct.
        num_queries: queries a sequence, at most `num_pairs`.
        num_keys: number of key tokens.
        num_values: number of value tokens.
        num_fillers: number of filler tokens, at least 2.
        distance: least distance in tokens from a query back to its value, and length of the first
            filler run at least. A stack of L local layers of window W sees L * (W - 1) tokens back.
        num_windows: sequences that `windows` gives, drawn apart from every training batch.
    """

    num_pairs: int = 16
    num_queries: int = 8
    num_keys: int = 32
    num_values: int = 16
    num_fillers: int = 15
    distance: int = 32
    num_windows: int = 256

    def __post_init__(self) -> None:
        """Check the settings."""
        for setting in fields(self):
            least = 2 if setting.name == "num_fillers" else 1
            if getattr(self, setting.name) < least:
                raise ValueError(
                    f"{setting.name}: expected at least {least}; got "
                    f"{getattr(self, setting.name)}; raise it to {least} or more"
                )
        for smaller, larger in (("num_queries", "num_pairs"), ("num_pairs", "num_keys")):
            if getattr(self, smaller) > getattr(self, larger):
                raise ValueError(
                    f"{smaller}: expected at most {larger} = {getattr(self, larger)}; got "
                    f"{getattr(self, smaller)}; "
                    f"lower {smaller} or raise {larger}"
                )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return 1 + self.num_keys + self.num_values + self.num_fillers

    @property
    def min_context(self) -> int:
        """Shortest T that holds the pairs, the distance and the queries."""
        return 2 * self.num_pairs + self.distance + 3 * self.num_queries - 1

    def batch(
        self,
        step: int,
        batch_size: int,
        context: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> RecallBatch:
        """Fresh sequences of `context` tokens; see `TokenSource.batch`.

        ValueError if `context` < `min_context`.
        """
        check_batch(batch_size, rank, world_size)
        sequence = self._draw(step_rng(seed, step), batch_size, context)
        return self._as_batch(sequence[rank::world_size])

    def windows(
        self, context: int, batch_size: int, limit: int | None = None
    ) -> Iterator[RecallBatch]:
        """The first of `num_windows` fixed sequences of `context` tokens.

        As many as `limit` tokens hold.
        """
        check_batch(batch_size)
        count = window_count(self.num_windows, context, limit)
        # training draws from the keys (0, step)
        rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1,)))
        sequence = self._draw(rng, self.num_windows, context)[:count]
        return (self._as_batch(part) for part in torch.split(sequence, batch_size))

    def _draw(self, rng: np.random.Generator, rows: int, context: int) -> Tensor:
        """Sequences [B, T + 1]."""
        if context < self.min_context:
            raise ValueError(
                f"context: expected at least {self.min_context} for {self.num_pairs} pairs, "
                f"distance {self.distance} and "
                f"{self.num_queries} queries; got {context}; raise it, or lower num_pairs, "
                f"distance or num_queries"
            )
        first_value = 1 + self.num_keys
        keys = 1 + _distinct(rng, rows, self.num_keys, self.num_pairs)  # [B, P]
        # [B, P]
        values = first_value + torch.from_numpy(
            rng.integers(0, self.num_values, size=(rows, self.num_pairs))
        )
        asked = _distinct(rng, rows, self.num_pairs, self.num_queries)  # [B, Q]

        # The tail holds Q queries of 3 tokens in random places: choose them as if each were 1 token
        # wide, then widen.
        tail_start = 2 * self.num_pairs + self.distance
        slots = context + 1 - tail_start - 2 * self.num_queries
        place = _distinct(rng, rows, slots, self.num_queries).sort(dim=1).values  # [B, Q]
        # [B, Q], positions of the marks
        mark = tail_start + place + 2 * torch.arange(self.num_queries)

        sequence = self._filler(rng, mark, context + 1)  # [B, T + 1]
        # [B, 2 P]
        sequence[:, : 2 * self.num_pairs] = torch.stack([keys, values], dim=2).flatten(1)
        sequence.scatter_(1, mark, MARK)
        sequence.scatter_(1, mark + 1, keys.gather(1, asked))
        return sequence.scatter_(1, mark + 2, values.gather(1, asked))

    def _filler(self, rng: np.random.Generator, mark: Tensor, length: int) -> Tensor:
        """Tokens [B, length] that alternate between two of a run; a run ends at each mark."""
        rows, runs = len(mark), self.num_queries + 1
        first = 1 + self.num_keys + self.num_values
        # [B, R, 2]
        pair = first + _distinct(rng, rows * runs, self.num_fillers, 2).view(rows, runs, 2)
        # [B, length]
        run = torch.zeros(rows, length, dtype=torch.int64).scatter_(1, mark, 1).cumsum(dim=1)
        return pair.flatten(1).gather(1, 2 * run + torch.arange(length) % 2)  # of [B, 2 R]

    def _as_batch(self, sequence: Tensor) -> RecallBatch:
        """Shift the sequences [B, T + 1] by one, and keep the targets that can be known."""
        batch = RecallBatch(sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous())
        filler = sequence > self.num_keys + self.num_values  # [B, T + 1]
        known = batch.is_query.clone()
        known[:, 1:] |= filler[:, :-2] & filler[:, 1:-1] & filler[:, 2:]
        return batch._replace(targets=batch.targets.masked_fill(~known, IGNORED))


def _distinct(rng: np.random.Generator, rows: int, options: int, count: int) -> Tensor:
    """Int64 [rows, count]: different numbers below `options` in each row, in random order."""
    return torch.from_numpy(rng.random((rows, options)).argsort(axis=1)[:, :count])
