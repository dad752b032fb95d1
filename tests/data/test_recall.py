"""Associative recall, walked through token by token by a reader.

The reader shares no code with the generator.
"""

import itertools

import pytest
import torch

from bayes_router.data import RecallBatch, RecallData
from bayes_router.types import IGNORED

SETTINGS = [
    (RecallData(), 128),
    (RecallData(), 97),
    (
        RecallData(num_pairs=4, num_queries=4, num_keys=4, num_values=2, num_fillers=2, distance=5),
        40,
    ),
    (
        RecallData(num_pairs=3, num_queries=1, num_keys=9, distance=1),
        RecallData(num_pairs=3, num_queries=1, distance=1).min_context,
    ),
    (RecallData(), RecallData().min_context),
]


def read(
    data: RecallData, tokens: list[int], last_target: int
) -> tuple[list[int], list[bool], list[int]]:
    """Targets and queries that a sequence must have, and how far back each answer lies."""
    after = [*tokens, last_target]
    is_key = [1 <= token <= data.num_keys for token in after]
    is_value = [data.num_keys < token <= data.num_keys + data.num_values for token in after]
    is_filler = [token > data.num_keys + data.num_values for token in after]
    written: dict[int, tuple[int, int]] = {}
    for place in range(0, 2 * data.num_pairs, 2):
        assert is_key[place] and is_value[place + 1] and after[place] not in written
        written[after[place]] = (after[place + 1], place + 1)

    targets, queries, distances = [], [], []
    for place in range(len(tokens)):
        in_pairs = place < 2 * data.num_pairs
        queried = is_key[place] and not in_pairs
        queries.append(queried)
        target = IGNORED
        if queried:
            assert after[place - 1] == 0, "a query is announced by the mark"
            # KeyError: asked twice, or never written
            target, value_place = written.pop(after[place])
            assert after[place + 1] == target, "the answer follows the query"
            distances.append(place - value_place)
        elif place and is_filler[place - 1] and is_filler[place] and is_filler[place + 1]:
            target = after[place - 1]
            assert after[place + 1] == target, "filler alternates"
        elif after[place] == 0:
            assert is_key[place + 1]
        targets.append(target)
    assert len(distances) == data.num_queries
    return targets, queries, distances


@pytest.mark.parametrize(("data", "context"), SETTINGS)
def test_sequences_are_what_the_task_says(data: RecallData, context: int) -> None:
    for batch in (data.batch(0, 32, context, seed=0), next(data.windows(context, 32))):
        assert batch.tokens.shape == batch.targets.shape == batch.is_query.shape == (32, context)
        assert (
            batch.tokens.dtype == batch.targets.dtype == torch.int64
            and batch.is_query.dtype == torch.bool
        )
        assert batch.tokens.min() >= 0 and batch.tokens.max() < data.vocab_size
        for tokens, targets, is_query in zip(
            batch.tokens.tolist(), batch.targets.tolist(), batch.is_query.tolist(), strict=True
        ):
            # an unscored end tells nothing: any filler
            last = targets[-1] if targets[-1] != IGNORED else data.vocab_size - 1
            expected, queries, distances = read(data, tokens, last)
            assert targets[:-1] == expected[:-1]
            assert is_query == queries
            assert min(distances) >= data.distance


def test_all_of_the_vocabulary_and_of_the_tail_is_used() -> None:
    data = RecallData()
    batch = data.batch(0, 512, 128, seed=0)
    assert len(set(batch.tokens.flatten().tolist())) == data.vocab_size == 64
    assert batch.is_query.any(dim=0).nonzero().flatten().tolist() == list(
        range(2 * 16 + 32 + 1, 128)
    )
    answers = batch.targets[batch.is_query]
    share = torch.bincount(answers - 1 - data.num_keys).double() / len(answers)
    assert share.max() < 1.3 / data.num_values  # a guesser gets nowhere
    runs = batch.tokens[:, 32:34]  # the first two tokens of filler
    assert not (runs[:, 0] == runs[:, 1]).any()


def test_order_of_queries_tells_nothing_about_the_order_of_pairs() -> None:
    batch = RecallData(num_queries=1).batch(0, 2048, 128, seed=0)
    asked = batch.tokens[batch.is_query]
    place = (batch.tokens[:, 0:32:2] == asked[:, None]).nonzero()[:, 1]
    assert torch.bincount(place, minlength=16).min() > 80  # 128 each on average


def test_batch_unpacks_as_tokens_and_targets() -> None:
    batch = RecallData().batch(0, 2, 128, seed=0)
    tokens, targets = batch
    assert isinstance(batch, RecallBatch) and tokens is batch.tokens and targets is batch.targets
    assert (targets[batch.is_query] != IGNORED).all()


def test_batch_is_a_function_of_seed_and_step() -> None:
    batches = [RecallData().batch(step, 4, 128, seed=1) for step in range(4)]
    assert torch.equal(RecallData().batch(2, 4, 128, seed=1).tokens, batches[2].tokens)
    assert not torch.equal(batches[2].tokens, batches[3].tokens)
    assert not torch.equal(batches[2].tokens, RecallData().batch(2, 4, 128, seed=2).tokens)


def test_ranks_share_out_the_rows_of_one_batch() -> None:
    data = RecallData()
    whole = data.batch(5, 6, 128, seed=0)
    for rank in range(2):
        part = data.batch(5, 6, 128, seed=0, rank=rank, world_size=2)
        assert torch.equal(part.tokens, whole.tokens[rank::2]) and torch.equal(
            part.targets, whole.targets[rank::2]
        )


def test_windows_are_fixed_and_not_trained_on() -> None:
    data = RecallData(num_windows=20)
    small, large = (
        torch.cat([batch.tokens for batch in data.windows(128, size)]) for size in (3, 64)
    )
    assert len(small) == 20 and torch.equal(small, large)
    limited = torch.cat([batch.tokens for batch in data.windows(128, 3, limit=128 * 7 + 5)])
    assert torch.equal(limited, small[:7])
    trained = torch.cat(
        [data.batch(step, data.num_windows, 128, seed=0).tokens for step in range(10)]
    )
    assert not {tuple(row) for row in small.tolist()} & {tuple(row) for row in trained.tolist()}


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_queries: expected at most num_pairs = 4; got 5"):
        RecallData(num_pairs=4, num_queries=5)
    with pytest.raises(ValueError, match="num_pairs: expected at most num_keys = 8; got 9"):
        RecallData(num_pairs=9, num_keys=8)
    for name, least in itertools.chain(
        (("num_fillers", 2),), ((name, 1) for name in ("num_values", "distance", "num_windows"))
    ):
        with pytest.raises(ValueError, match=f"{name}: expected at least {least}; got {least - 1}"):
            RecallData(**{name: least - 1})
    data = RecallData()
    for call in (lambda: data.batch(0, 2, 86, seed=0), lambda: data.windows(86, 2)):
        with pytest.raises(ValueError, match="context: expected at least 87 .* got 86"):
            call()
    with pytest.raises(ValueError, match="batch_size"):
        data.batch(0, 3, 128, seed=0, world_size=2)
    with pytest.raises(ValueError, match="limit"):
        data.windows(128, 2, limit=100)
