"""Several kinds of text as one source: each row of a batch is of a kind drawn by its share."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.stream import TokenStream, stream_of
from bayes_router.data.tokens import Batch, check_batch, step_rng

PIECE = 4096
"""Tokens of one kind that stand together in text that is held out, before the next kind follows."""


class Mixture:
    """Streams by name, from which training rows are drawn at random, by share.

    A price that is set on one kind of text spends what it should on another only if the fit has
    seen both.

    Args:
        streams: by name.
        shares: how often each is drawn, relative to one another; by default all alike.

    Raises:
        ValueError: no stream, streams of different vocabularies, or shares that are not one
            positive number a stream.
    """

    def __init__(
        self, streams: Mapping[str, TokenStream], shares: Mapping[str, float] | None = None
    ):
        sizes = {stream.vocab_size for stream in streams.values()}
        require(
            len(sizes) == 1,
            "texts",
            "one stream or more, of one vocabulary",
            sorted(sizes) or "none",
        )
        chosen = dict.fromkeys(streams, 1.0) if shares is None else dict(shares)
        fits = set(chosen) == set(streams) and all(s > 0 for s in chosen.values())
        require(fits, "shares", f"a positive number for each of {', '.join(streams)}", chosen)
        self.streams, self.vocab_size, self.name = dict(streams), sizes.pop(), " + ".join(streams)
        total = sum(chosen.values())
        self.shares = {name: chosen[name] / total for name in streams}

    @property
    def tokens(self) -> Tensor:
        """The tokens of all kinds, one after another."""
        return torch.cat([stream.tokens for stream in self.streams.values()])

    def __len__(self) -> int:
        """Number of tokens of all kinds."""
        return sum(map(len, self.streams.values()))

    def batch(
        self,
        step: int,
        batch_size: int,
        context: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """See `TokenSource.batch`."""
        check_batch(batch_size, rank, world_size)
        names, shares = list(self.streams), list(self.shares.values())
        kinds = step_rng(seed + 1, step).choice(len(names), size=batch_size, p=shares)[
            rank::world_size
        ]
        each = [
            self.streams[name].batch(step, batch_size, context, seed, rank, world_size)
            for name in names
        ]
        rows = [(each[kind].tokens[i], each[kind].targets[i]) for i, kind in enumerate(kinds)]
        return Batch(*(torch.stack(list(side)) for side in zip(*rows, strict=True)))

    def windows(self, context: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Windows of each kind by turns, as far as the shortest goes.

        At most `limit` tokens of them.
        """
        turns = zip(*(s.windows(context, 1) for s in self.streams.values()), strict=False)
        batches = (batch for turn in turns for batch in turn)
        left = None if limit is None else limit // context
        while left is None or left > 0:
            size = batch_size if left is None else min(batch_size, left)
            some = list(islice(batches, size))
            if not some:
                return
            yield Batch(torch.cat([b.tokens for b in some]), torch.cat([b.targets for b in some]))
            left = None if left is None else left - len(some)

    def split(self, valid_fraction: float) -> "tuple[Mixture, TokenStream]":
        """The beginnings, and the ends in one stream.

        They stand in pieces of each kind by turns and by share.
        """
        parts = {name: stream.split(valid_fraction) for name, stream in self.streams.items()}
        ends = {name: last.tokens for name, (_, last) in parts.items()}
        turns = min(len(end) / self.shares[name] for name, end in ends.items())
        size = min(PIECE / max(self.shares.values()), turns)
        kept, at = list[torch.Tensor](), dict.fromkeys(ends, 0.0)
        for _ in range(int(turns / size)):
            for name, share in self.shares.items():
                kept.append(ends[name][int(at[name]) : int(at[name] + share * size)])
                at[name] += share * size
        held_out = next(iter(parts.values()))[1].like(torch.cat(kept))
        return Mixture({name: first for name, (first, _) in parts.items()}, self.shares), held_out


def source_of(texts: Any, tokenizer: Any, vocab_size: int, causal: bool) -> "TokenStream | Mixture":
    """What a fit reads: a mixture, as it is or from texts by name; anything else as `stream_of`."""
    if isinstance(texts, Mixture):
        return texts
    if not isinstance(texts, Mapping):
        return stream_of(texts, tokenizer, vocab_size, causal)
    return Mixture({str(k): stream_of(t, tokenizer, vocab_size, causal) for k, t in texts.items()})
