import numpy as np
import pytest
import torch

from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.measures.evidence import auroc_of, evidence_apart, token_scores
from bayes_router.routing.watch import watching
from bayes_router.training.evidence import fit_evidence
from tests.tiny import tiny_model


def text(low: int, high: int, seed: int, N: int = 1500) -> torch.Tensor:
    return torch.randint(low, high, (N,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    """Fitted on ids below 12."""
    found = tiny_model().eval()
    rows = text(0, 12, 0, 4001)[: 20 * 200].view(20, 200)
    fit_evidence(found, [Batch(rows, rows)], torch.full((3,), 0.5), memory=16)
    return found


def test_a_planted_shift_is_told_apart_by_token_and_the_same_kind_is_not(model):
    table = evidence_apart(
        model, text(0, 12, 1), {"same": text(0, 12, 2), "other": text(12, 23, 3)}, 100, draws=30
    )
    found = table.set_index(["text", "score"])
    assert (
        found.loc[("other", "token"), "low"] > 0.9 and found.loc[("other", "recent"), "low"] > 0.97
    )
    for score in ("token", "recent"):
        row = found.loc[("same", score)]
        assert row["low"] < 0.5 < row["high"] + 0.05 and abs(row["auroc"] - 0.5) < 0.1
    assert found.loc[("other", "token"), "n"] == 1400


def test_scores_are_those_of_a_watch_and_no_token_sees_the_future(model):
    tokens = text(0, 23, 4, 201)
    scores = token_scores(model, tokens, 100)
    with watching(model.controller) as watch:
        model(tokens[:200].view(2, 100))
    layers = watch.log_evidence.double()
    np.testing.assert_allclose(scores["recent"], -layers.mean(0).numpy(), rtol=1e-4, atol=1e-5)
    changed = tokens.clone()
    changed[150:] = 3
    later = token_scores(model, changed, 100)
    np.testing.assert_allclose(later["recent"][1, :50], scores["recent"][1, :50], rtol=1e-5)
    assert not np.allclose(later["recent"][1, 50:], scores["recent"][1, 50:])


def test_what_cannot_be_told_apart(model):
    with pytest.raises(ValueError, match="text: expected at least 101 tokens"):
        token_scores(model, text(0, 12, 0, 50), 100)
    with pytest.raises(ValueError, match="evidence: expected a density"):
        token_scores(tiny_model(), text(0, 12, 0), 100)


def test_the_interval_of_an_auroc_is_over_windows():
    random = np.random.default_rng(0)
    own, other = (random.normal(at, 1, (20, 1)) + random.normal(0, 0.1, (20, 50)) for at in (0, 1))
    found = auroc_of(other, own, 100)
    assert found.low < 0.76 < found.high and found.high - found.low > 0.1 and found.n == 2000
