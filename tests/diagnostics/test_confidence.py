import numpy as np
import pandas as pd
import pytest

from bayes_router.diagnostics.measures.bootstrap import clustered
from bayes_router.diagnostics.measures.calibration import rank_correlation
from bayes_router.diagnostics.measures.confidence import (
    Confidence,
    baselines,
    confidence_table,
    conformal_sets,
    quality,
    right_within,
    split,
)
from bayes_router.diagnostics.measures.references import references
from bayes_router.diagnostics.measures.regression import Linear, Logistic, Standard

EXPERTS = ("a", "b", "c")


def planted(rows: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Whether a choice is right depends on the prediction's entropy and the layer.

    The posterior says nothing of it.
    """
    random = np.random.default_rng(seed)
    mean = random.dirichlet([2.0, 2.0, 2.0], rows)
    choice, layer, entropy = (
        mean.argmax(1),
        random.integers(0, 2, rows),
        random.gamma(1.0, 1.0, rows),
    )
    probability = 1 / (1 + np.exp(2.5 * np.log(entropy + 0.01) - layer))
    right = random.random(rows) < probability
    losses = np.full((rows, 3), 1.0)
    best = np.where(right, choice, (choice + 1) % 3)
    losses[np.arange(rows), best] -= np.where(right, 0.0, 0.1 + entropy)
    frame = pd.DataFrame({f"loss_{name}": losses[:, e] for e, name in enumerate(EXPERTS)})
    for e, name in enumerate(EXPERTS):
        frame[f"mean_{name}"] = frame[f"largest_{name}"] = mean[:, e]
    frame["choice"], frame["layer"], frame["sequence"] = (
        np.array(EXPERTS)[choice],
        layer,
        np.arange(rows) // 20,
    )
    frame["regret"] = losses[np.arange(rows), choice] - losses.min(1)
    frame["entropy_of_mean"] = -(mean * np.log(mean)).sum(1)
    frame["total_concentration"], frame["predictive_entropy"], frame["planted"] = (
        3.0,
        entropy,
        probability,
    )
    frame["position"] = random.integers(0, 100, rows)
    return frame


def test_a_planted_confidence_is_found_on_text_that_its_fit_never_saw():
    fitted, read = split(planted())
    assert not set(fitted["sequence"]) & set(read["sequence"])
    confidence = Confidence(fitted, EXPERTS, 0.01)
    stated = confidence(read)
    assert float(np.abs(stated - read["planted"]).mean()) < 0.05
    base = float(right_within(fitted, 0.01).mean())
    found, truth = (
        quality(p, read, 0.01, base, draws=20) for p in (stated, read["planted"].to_numpy())
    )
    assert found.ece.value < 0.05 and found.gain.low > 0.2 and found.rank.low > 0.3
    assert found.auroc.value == pytest.approx(truth.auroc.value, abs=0.02)
    assert found.auroc.low < found.auroc.value < found.auroc.high and found.auroc.n == len(read)
    told = quality(
        baselines(fitted, read, EXPERTS, 0.01)["temperature"], read, 0.01, base, draws=20
    )
    assert told.auroc.low < 0.55 < found.auroc.low  # the posterior was planted to know nothing


def test_what_surprised_before_is_made_use_of_where_a_frame_says_it():
    frame, random = planted(6000), np.random.default_rng(4)
    surprise = random.gamma(2.0, 1.0, len(frame))
    right = random.random(len(frame)) < 1 / (1 + np.exp(1.5 * (surprise - 2)))
    losses = np.full((len(frame), 3), 1.0)
    chosen = frame["choice"].map(list(EXPERTS).index).to_numpy()
    losses[np.arange(len(frame)), np.where(right, chosen, (chosen + 1) % 3)] = 0.5
    frame = frame.assign(**{f"loss_{name}": losses[:, e] for e, name in enumerate(EXPERTS)})
    frame["regret"] = np.where(right, 0.0, 0.5)
    fitted, read = split(frame)
    first, last = np.split(surprise, 2)
    seen = fitted.assign(surprise=first), read.assign(surprise=last)
    told, blind = (
        quality(Confidence(a, EXPERTS, 0.01)(b), b, 0.01, 0.5, draws=20).auroc
        for a, b in (seen, (fitted, read))
    )
    assert told.low > 0.75 and blind.high < 0.55


def test_confidence_does_not_look_at_the_losses_it_is_read_on():
    fitted, read = split(planted(800))
    confidence = Confidence(fitted, EXPERTS, 0.01)
    blind = read.assign(regret=9.0, **{f"loss_{name}": 9.0 for name in EXPERTS})
    np.testing.assert_array_equal(confidence(blind), confidence(read))


def test_nor_do_the_usual_means():
    fitted, read = split(planted(800))
    blind = read.assign(regret=9.0, **{f"loss_{name}": 9.0 for name in EXPERTS})
    stated, told = (baselines(fitted, frame, EXPERTS, 0.01) for frame in (read, blind))
    assert stated.keys() == told.keys()
    for name, probability in stated.items():
        np.testing.assert_array_equal(told[name], probability, err_msg=name)


def test_a_regret_of_exactly_the_tolerance_is_right():
    regret = pd.DataFrame({"regret": [0.0, 0.25, np.nextafter(0.25, 1)]})
    assert right_within(regret, 0.25).tolist() == [True, True, False]


def test_what_is_said_of_the_chosen_expert_is_asked_though_another_is_the_likeliest():
    """Choices at random, each right with the probability that the posterior gives it."""
    random, rows = np.random.default_rng(3), 4000
    frame = planted(rows)
    mean = frame[[f"mean_{name}" for name in EXPERTS]].to_numpy()
    chosen = random.integers(0, 3, rows)
    planted_in = mean[np.arange(rows), chosen]
    losses = np.full((rows, 3), 1.0)
    best = np.where(random.random(rows) < planted_in, chosen, (chosen + 1) % 3)
    losses[np.arange(rows), best] = 0.5
    frame = frame.assign(choice=np.array(EXPERTS)[chosen], layer=0, predictive_entropy=1.0)
    frame = frame.assign(**{f"loss_{name}": losses[:, e] for e, name in enumerate(EXPERTS)})
    frame["regret"] = losses[np.arange(rows), chosen] - 0.5
    frame["planted"] = planted_in
    fitted, read = split(frame)
    stated = Confidence(fitted, EXPERTS, 0.01)(read)
    assert float(np.abs(stated - read["planted"]).mean()) < 0.04


def test_the_base_rate_gains_nothing():
    fitted, read = split(planted(2000))
    base = float(right_within(fitted, 0.01).mean())
    found = quality(np.full(len(read), base), read, 0.01, base, draws=20)
    assert found.gain.value == 0 and found.auroc.value == 0.5 and np.isnan(found.rank.value)


def test_logistic_regression_finds_its_weights():
    random = np.random.default_rng(1)
    x = random.normal(size=(20_000, 2)) * [1.0, 10.0]
    right = random.random(len(x)) < 1 / (1 + np.exp(-(x @ [1.5, -0.1] + 0.5)))
    model = Logistic.fit(x, right, ridge=1.0)
    assert model.linear.weight[:2] == pytest.approx([1.5, -0.1], rel=0.08)
    assert model(np.zeros((1, 2)))[0] == pytest.approx(1 / (1 + np.exp(-0.5)), abs=0.02)


def test_a_ridge_shrinks_groups_of_few_rows_and_leaves_the_bias():
    few, many, _ = np.eye(3)[[0] * 5 + [1] * 5000 + [2] * 5000].T
    target = 3.0 + 2.0 * many + 2.0 * few
    model = Linear.fit(np.column_stack([few, many]), target, ridge=10.0)
    assert 0 < model.weight[0] < 0.6 * 2 < 0.9 * 2 < model.weight[1] < 2.01
    free = Linear.fit(np.column_stack([few, many]), target, ridge=1e-9)
    assert free(np.eye(2)) == pytest.approx([5.0, 5.0], abs=1e-4)
    x = np.array([[1.0, 4.0], [3.0, 4.0]])
    np.testing.assert_allclose(Standard.of(x)(x), [[-1, 0], [1, 0]])


def test_the_spread_of_a_unit_is_found_though_which_side_is_right_is_chance():
    """Units differ in what hangs on their routes by factors; the side is a coin's toss."""
    random, N = np.random.default_rng(5), 6000
    unit = random.integers(0, 12, N)
    size = np.exp(random.normal(0, 0.5, N)) * 1e-3 * 1.8 ** (unit - 6)
    side = random.random(N) < 0.5
    frame = pd.DataFrame({"loss_a": 1 + size * side, "loss_b": 1 + size * ~side})
    frame["choice"], frame["layer"], frame["unit"] = "a", unit % 3, unit // 3
    frame["sequence"], frame["position"] = np.arange(N) // 30, random.integers(0, 99, N)
    frame["mean_a"], frame["mean_b"] = 0.6, 0.4
    frame["regret"] = frame["loss_a"] - frame[["loss_a", "loss_b"]].min(axis=1)
    for column in ("entropy_of_mean", "total_concentration", "predictive_entropy"):
        frame[column] = 1.0
    fitted, read = split(frame)
    stated = Confidence(fitted, ("a", "b"), 1e-3)(read)
    found = quality(stated, read, 1e-3, float(right_within(fitted, 1e-3).mean()), draws=20)
    best = references(read, draws=20)[0]
    assert best["stated by"] == "reference: the spread itself"
    # half of the regrets are none: knowing every size exactly ranks no better than this
    assert 0.95 * best["value"] < found.rank.value <= best["value"] < 0.6
    assert found.ece.value < 0.05


def test_references_stand_in_the_table_with_what_each_knows():
    frame = planted(1200)
    random = np.random.default_rng(0)
    frame["foreseen"] = frame["regret"]  # whoever foresees it all
    frame["redrawn"], frame["redrawn_again"] = random.random((2, len(frame)))
    fitted, read = split(frame)
    table = confidence_table(fitted, read, EXPERTS, 0.01, draws=10).set_index("stated by")["value"]
    assert table["reference: every route's prediction"] == pytest.approx(1)
    assert abs(table["reference: measured twice"]) < 0.15


def test_the_best_that_a_prediction_can_do_is_found_from_what_it_draws():
    """Regret is what is known and chance in equal parts: whoever knows it ranks with a planted."""
    random, N = np.random.default_rng(6), 6000
    known = random.normal(size=N)
    frame = planted(N).assign(
        regret=known + random.normal(size=N),
        redrawn=known + random.normal(size=N),
        redrawn_again=known + random.normal(size=N),
        foreseen=np.exp(known),
    )
    found = {row["stated by"]: row for row in references(frame, draws=20)}
    best = found["reference: the same at its best"]
    expected = rank_correlation(known, frame["regret"].to_numpy())
    assert best["low"] < best["value"] < best["high"]
    assert best["value"] == pytest.approx(expected, abs=0.03) and expected > 0.6
    assert found["reference: every route's prediction"]["value"] == pytest.approx(expected)
    told = quality(-known, frame, 0.0, 0.5, draws=20)
    assert told.expected_rank is not None and told.expected_rank.value == pytest.approx(1)
    assert told.rank.value == pytest.approx(expected)
    assert quality(-known, planted(N), 0.0, 0.5, draws=20).expected_rank is None


def test_conformal_sets_hold_the_best_expert_as_often_as_asked():
    fitted, read = split(planted(6000, seed=2))
    for coverage in (0.5, 0.9):
        sets = conformal_sets(fitted, read, EXPERTS, coverage)
        assert sets.coverage.value == pytest.approx(coverage, abs=0.03)
    assert conformal_sets(fitted, read, EXPERTS, 0.5).size < sets.size <= 3
    with pytest.raises(
        ValueError, match="regret: expected at least 99 rows for a coverage of 0.99"
    ):
        conformal_sets(fitted[:50], read, EXPERTS, 0.99)
    with pytest.raises(ValueError, match="coverage: expected a probability"):
        conformal_sets(fitted, read, EXPERTS, 1.0)


def test_an_interval_over_windows_covers_and_is_wider_than_one_over_rows():
    hits, random = 0, np.random.default_rng(3)
    for trial in range(60):
        windows = random.normal(0, 1, 30)
        x = np.repeat(windows, 10) + random.normal(0, 0.1, 300)
        found = clustered(
            lambda rows, x=x: float(x[rows].mean()),
            np.repeat(np.arange(30), 10),
            draws=200,
            seed=trial,
        )
        hits += found.low <= 0 <= found.high
    assert hits >= 51  # 60 x 0.93 expected; over rows about 30
    rows = clustered(lambda rows: float(x[rows].mean()), np.arange(300), draws=200)
    assert rows.high - rows.low < 0.6 * (found.high - found.low)


@pytest.mark.filterwarnings("error")
def test_a_figure_that_no_draw_knows_has_no_interval():
    found = clustered(lambda rows: float("nan"), range(5))
    assert np.isnan([found.value, found.low, found.high]).all()


def test_what_cannot_be_said():
    frame = planted(40)
    with pytest.raises(ValueError, match="regret: expected at least four sequences"):
        split(frame)
    with pytest.raises(
        ValueError, match="regret: expected choices right and wrong; got '100% right'"
    ):
        Confidence(frame.assign(regret=0.0), EXPERTS, 0.01)
    with pytest.raises(ValueError, match="windows: expected at least two"):
        clustered(lambda rows: 0.0, [1, 1])
    with pytest.raises(ValueError, match="level: expected a probability"):
        clustered(lambda rows: 0.0, [1, 2], level=1.0)
