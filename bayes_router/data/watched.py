"""A source of held-out text that tells how much of it was read."""

from collections.abc import Iterator

from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.progress import Progress


class WatchedSource:
    """`source` itself, whose batches count as steps of `progress`, one a window.

    Reads of a source overlap neither in time nor in threads, so one progress serves all of them.
    """

    def __init__(self, source: TokenSource, progress: Progress):
        self.source, self.progress = source, progress

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.source.vocab_size

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
        return self.source.batch(step, batch_size, context, seed, rank, world_size)

    def windows(self, context: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """See `TokenSource.windows`."""
        for batch in self.source.windows(context, batch_size, limit):
            yield batch
            self.progress.step(len(batch.tokens))
