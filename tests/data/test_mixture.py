"""Several kinds of text as one source."""

import pytest
import torch

from bayes_router.data.mixture import Mixture, source_of
from bayes_router.data.stream import TokenStream

KINDS = {"low": torch.arange(0, 40).repeat(50), "high": torch.arange(60, 100).repeat(25)}


def mixture(**shares: float) -> Mixture:
    return Mixture({k: TokenStream(t, 100, k) for k, t in KINDS.items()}, shares or None)


def kind_of(row: torch.Tensor) -> str:
    assert bool((row < 50).all()) or bool((row > 50).all())
    return "low" if row[0] < 50 else "high"


def test_rows_are_of_one_kind_and_drawn_by_share() -> None:
    source = mixture(low=3.0, high=1.0)
    kinds = [kind_of(row) for step in range(60) for row in source.batch(step, 8, 20, 0).tokens]
    assert 0.69 < kinds.count("low") / len(kinds) < 0.81
    assert source.shares == {"low": 0.75, "high": 0.25}


def test_a_step_names_its_batch_and_ranks_share_it() -> None:
    source = mixture()
    whole, again, other = (source.batch(step, 6, 20, 1) for step in (4, 4, 5))
    assert torch.equal(whole.tokens, again.tokens) and not torch.equal(whole.tokens, other.tokens)
    assert torch.equal(whole.targets[:, :-1], whole.tokens[:, 1:])
    parts = [source.batch(4, 6, 20, 1, rank, 2).tokens for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole.tokens)


def test_windows_take_turns() -> None:
    batches = list(mixture().windows(30, 4, 300))
    kinds = [kind_of(row) for batch in batches for row in batch.tokens]
    assert kinds == ["low", "high"] * 5 and [len(b.tokens) for b in batches] == [4, 4, 2]


def test_what_is_held_out_is_of_every_kind_and_read_by_no_row() -> None:
    source, held_out = mixture(low=3.0, high=1.0).split(0.2)
    assert len(source) == 0.8 * (2000 + 1000)
    low = float((held_out.tokens < 50).double().mean())
    assert 0.7 < low < 0.8 and len(held_out) > 500
    assert held_out.vocab_size == 100 and source.shares == {"low": 0.75, "high": 0.25}


def test_texts_by_name_make_one() -> None:
    made = source_of(KINDS, None, 100, True)
    assert isinstance(made, Mixture) and made.name == "low + high" and len(made) == 3000
    assert source_of(made, None, 100, True) is made
    assert isinstance(source_of(KINDS["low"], None, 100, True), TokenStream)


@pytest.mark.parametrize("shares", [{"low": 1.0}, {"low": 1.0, "high": 0.0}])
def test_shares_that_do_not_fit_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(
        ValueError, match="shares: expected a positive number for each of low, high"
    ):
        mixture(**shares)


def test_streams_of_two_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="texts: expected one stream or more, of one vocabulary"):
        Mixture(
            {k: TokenStream(t, n, k) for (k, t), n in zip(KINDS.items(), (100, 101), strict=True)}
        )
