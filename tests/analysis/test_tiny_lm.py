"""The harness of the study at toy size: every contender trains, is read on the executed route, and is not run twice."""

from pathlib import Path

import pandas as pd
import pytest

from analysis.sweep import run_one, sweep
from analysis.tiny_lm import HEADLINE, SHORT, markdown, plan, summarise

COLUMNS = {
    "contender",
    "corpus",
    "context",
    "tokens",
    "seed",
    "nll_mean",
    "nll_hard",
    "cost_paper",
    "cost_flops",
    "route_information",
    "routing_entropy",
}


@pytest.fixture(scope="module")
def frame(corpus: str) -> pd.DataFrame:
    return pd.DataFrame([run_one(job) for job in plan("toy", f"text:{corpus}", 1, list(SHORT))])


def test_every_contender_has_a_row_at_the_same_tokens(frame: pd.DataFrame) -> None:
    assert set(frame["contender"]) == set(SHORT)
    assert set(frame) >= COLUMNS
    assert frame["tokens"].nunique() == 1
    assert frame[["nll_mean", "nll_hard"]].lt(7).all().all()


def test_static_contenders_cost_what_their_pattern_says(frame: pd.DataFrame) -> None:
    cost = frame.set_index("contender")["cost_paper"]
    assert cost["full attention"] == pytest.approx(1.0)
    assert cost["linear"] == pytest.approx(0.15)
    assert cost["static: local, local, local, full"] == pytest.approx((3 * 0.3 + 1) / 4)
    assert cost["static: gated, local, gated, full"] == pytest.approx((2 * 0.15 + 0.3 + 1) / 4)
    static = frame[frame["contender"].isin(["full attention", "local", "linear"])]
    assert (static["nll_mean"] - static["nll_hard"]).abs().max() < 1e-3
    assert static["route_information"].abs().max() < 1e-6


def test_a_finished_row_is_not_run_again(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = plan("toy", f"text:{corpus}", 1, ["local"])
    first = sweep(jobs, tmp_path / "r.csv", 1)
    monkeypatch.setattr("analysis.sweep.run_one", lambda job: pytest.fail("ran again"))
    pd.testing.assert_frame_equal(sweep(jobs, tmp_path / "r.csv", 1), first, check_dtype=False)


def test_the_table_counts_seeds_and_their_error() -> None:
    rows = [
        {"corpus": "c", "context": 8, "contender": "a", "nll_mean": x, "nll_hard": x, "cost_paper": 0.3, "cost_flops": 0.2}
        | {"route_information": 0.1, "routing_entropy": 0.5}
        for x in (1.0, 2.0, 3.0)
    ]
    table = summarise(pd.DataFrame(rows))
    assert (table["n"].item(), table["nll_hard"].item()) == (3, 2.0)
    assert table["se"].item() == pytest.approx(1 / 3**0.5)
    assert "| a | 3 | 2.0000 | 0.5774 |" in markdown(table)


def test_headline_rows_get_the_seeds() -> None:
    jobs = plan("toy", "sotu", 5, list(SHORT))
    seeds = pd.Series([job["name"] for job in jobs]).value_counts()
    assert all(seeds[name] == (5 if name in HEADLINE else 2) for name in SHORT)
