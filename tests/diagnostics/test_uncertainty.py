import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.distributions import Dirichlet

from bayes_router.data.tokenisers import ByteTokeniser
from bayes_router.diagnostics.measures.kinds import TokenKind, kinds_of_vocabulary, token_kind
from bayes_router.diagnostics.measures.uncertainty import (
    Measure,
    UncertaintySummary,
    cost_interval,
    credible_interval,
    probability_right,
    summarise_uncertainty,
    token_frame,
)
from bayes_router.diagnostics.reading import pieces, text_windows
from bayes_router.types import IGNORED
from tests.diagnostics.toy import reading

COST = torch.tensor([1.0, 0.15, 0.3])


def test_probability_right_is_that_of_a_beta_for_two_experts():
    q = torch.tensor([[0.3, 0.2], [5.0, 2.0], [0.05, 0.04], [40.0, 60.0]])
    a, b = q.max(-1).values.numpy(), q.min(-1).values.numpy()
    np.testing.assert_allclose(probability_right(q), stats.beta.sf(0.5, a, b), atol=2e-5)


def test_probability_right_agrees_with_sampling():
    q = torch.tensor([[0.4, 0.5, 0.3], [9.0, 7.0, 2.0], [0.02, 0.9, 0.1]])
    torch.manual_seed(0)
    draws = Dirichlet(q.double()).sample((200_000,))
    observed = (draws.argmax(-1) == q.argmax(-1)).double().mean(0)
    assert (probability_right(q) - observed).abs().max() < 4e-3


def test_credible_intervals_are_quantiles_of_the_marginals():
    low, high = credible_interval(torch.tensor([[1.0, 1.0], [2.0, 1.0]]), 0.9)
    assert low[0].tolist() == pytest.approx([0.05, 0.05]) and high[0].tolist() == pytest.approx(
        [0.95, 0.95]
    )
    assert float(low[1, 0]) == pytest.approx(0.05**0.5)  # Beta(2, 1) has P(x < t) = t^2
    q = torch.tensor([0.7, 2.0, 0.4])
    torch.manual_seed(0)
    draws = Dirichlet(q.double()).sample((100_000,))
    low, high = credible_interval(q, 0.8)
    inside = ((draws >= low) & (draws <= high)).double().mean(0)
    assert (inside - 0.8).abs().max() < 6e-3


def test_credible_interval_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="interval: expected a probability"):
        credible_interval(torch.ones(2), 1.0)


def test_cost_interval_for_two_experts_is_a_scaled_beta():
    q = torch.tensor([[[3.0, 2.0], [0.5, 0.7]]])  # [L 1, N 2, E 2]
    low, high = cost_interval(q, torch.tensor([1.0, 0.2]), 0.9, draws=40_000)
    for n, (a, b) in enumerate(q[0].tolist()):
        expected = 0.2 + 0.8 * stats.beta.ppf([0.05, 0.95], a, b)
        assert [float(low[n]), float(high[n])] == pytest.approx(expected.tolist(), abs=0.01)


def test_cost_interval_narrows_with_layers_and_leaves_the_generator_alone():
    q = torch.full((1, 1, 3), 0.5)
    state = torch.get_rng_state()
    one, sixteen = (cost_interval(q.expand(L, 1, 3), COST, draws=4000) for L in (1, 16))
    assert float(sixteen[1] - sixteen[0]) < 0.4 * float(one[1] - one[0])
    assert torch.equal(state, torch.get_rng_state())


def test_token_frame_holds_together():
    q = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(0)) * 4 + 0.05
    frame = token_frame(q, ["full", "gated", "local"], COST)
    assert len(frame) == 60 and list(frame["layer"].unique()) == [0, 1]
    means = frame[["mean_full", "mean_gated", "mean_local"]]
    np.testing.assert_allclose(means.sum(axis=1), 1)
    np.testing.assert_allclose(
        frame["mutual_information"],
        frame["entropy_of_mean"] - frame["expected_entropy"],
        atol=1e-12,
    )
    assert (frame["low_full"] <= frame["high_full"]).all() and (
        frame["mutual_information"] >= 0
    ).all()
    assert (frame["choice"] == means.idxmax(axis=1).str.removeprefix("mean_")).all()
    per_token = frame.groupby("token")["cost"].mean()
    np.testing.assert_allclose(per_token, frame.groupby("token")["token_cost"].first())


def test_token_frame_refuses_another_shape():
    with pytest.raises(ValueError, match=r"concentration: expected shape \[L, N, E\]"):
        token_frame(torch.ones(3, 4), ["a", "b", "c", "d"], torch.ones(4))


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ("a", "letter"),
        ("A", "capital"),
        (" word", "word"),
        ("7", "digit"),
        (" ", "space"),
        ("\n", "newline"),
        (",", "punctuation"),
    ],
)
def test_kinds(piece, kind):
    assert token_kind(piece).value == kind


def test_summary_is_the_mean_of_the_tokens_whatever_the_batches():
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(2, 6, 8, 3, generator=generator) * 3 + 0.02
    tokens = torch.randint(32, 127, (6, 8), generator=generator)
    kinds = kinds_of_vocabulary(ByteTokeniser())
    whole = UncertaintySummary(COST, kinds).add(reading(q, tokens))
    parts = UncertaintySummary(COST, kinds)
    for start in (0, 1, 4):
        stop = {0: 1, 1: 4, 4: 6}[start]
        parts.add(reading(q[:, start:stop], tokens[start:stop]))
    parts.add(reading(q[:, :1, :3], tokens[:1, :3]))  # a shorter window at the end
    assert parts.tokens == 51
    frame = token_frame(q.flatten(1, 2), ["full", "gated", "local"], COST)
    frame["position"] = frame["token"] % 8
    frame["kind"] = [list(TokenKind)[kinds[t]].value for t in tokens.flatten().tolist()] * 2
    for table, by in (
        (whole.layers().reset_index(), ["layer"]),
        (whole.positions(), ["layer", "position"]),
    ):
        expected = frame.groupby(by)["entropy_of_mean"].mean().reset_index()["entropy_of_mean"]
        np.testing.assert_allclose(table["entropy_of_mean"], expected)
    merged = whole.kinds_frame().merge(
        frame.groupby(["layer", "kind"])["cost"].mean().reset_index(), on=["layer", "kind"]
    )
    np.testing.assert_allclose(merged["cost_x"], merged["cost_y"])
    assert merged["share"].sum() == pytest.approx(2)


def test_summary_keeps_sums_alone():
    summary = UncertaintySummary(COST, kinds_of_vocabulary(ByteTokeniser()))

    def size() -> int:
        return sum(x.numel() for x in vars(summary).values() if isinstance(x, torch.Tensor))

    summary.add(reading(torch.ones(2, 3, 16, 3)))
    before = size()
    for _ in range(5):
        summary.add(reading(torch.ones(2, 3, 16, 3)))
    assert size() == before and summary.tokens == 6 * 48


def test_a_sure_posterior_has_no_uncertainty():
    q = torch.tensor([1e6, 1e-3, 1e-3]).expand(1, 1, 4, 3)
    row = UncertaintySummary(COST).add(reading(q)).layers().iloc[0]
    assert (
        row[Measure.SURE.value] == 1
        and row["probability_right"] == pytest.approx(1)
        and row["entropy_of_mean"] < 1e-6
    )


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="text: expected at least one token"):
        summarise_uncertainty([], COST)
    with pytest.raises(ValueError, match="text: expected at least one token"):
        text_windows(b"", ByteTokeniser(), 8)
    with pytest.raises(ValueError, match="text: expected UTF-8"):
        text_windows(b"\xff", ByteTokeniser(), 8)


def test_text_windows_hold_every_token_once():
    text = "naïve — text, 23".encode()
    batches = list(text_windows(text, ByteTokeniser(), 5))
    assert bytes(torch.cat([b.tokens[0] for b in batches]).tolist()) == text
    targets = torch.cat([b.targets[0] for b in batches])
    assert bytes(targets[:-1].tolist()) == text[1:] and targets[-1] == IGNORED


def test_pieces_show_a_character_once():
    text = "aé€😀\x00<"
    shown = pieces(list(text.encode()), ByteTokeniser())
    assert "".join(shown) == text and shown[1:3] == ["", "é"] and len(shown) == len(text.encode())
    assert pieces([0xC3], ByteTokeniser()) == ["\ufffd"] and pieces([5, 7], None) == ["5 ", "7 "]


def test_nothing_but_kinds_that_occur():
    kinds = UncertaintySummary(COST).add(reading(torch.ones(1, 1, 4, 3))).kinds_frame()
    assert isinstance(kinds, pd.DataFrame) and kinds.empty
