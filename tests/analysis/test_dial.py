"""The study of the dial: two policies at one executed cost, over several seeds."""

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.routes import dial
from bayes_router.config import config_from_dict
from bayes_router.training.fit import fit
from tests.tiny import fit_config


def test_policies_are_compared_at_one_cost_over_seeds(
    corpus: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fit_config(corpus)
    fit(
        config_from_dict({"train": {"seed": config.train.seed + 1}}, config),
        tmp_path / "other",
        progress=False,
    )
    options = [
        "--tokens",
        "128",
        "--thresholds",
        "0.6",
        "--budgets",
        "0.25",
        "0.3",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr("sys.argv", ["dial", str(finished_run), str(tmp_path / "other"), *options])
    dial.main()
    curve, frame = (
        pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("dial", "dial_conservative")
    )
    assert set(curve["seed"]) == set(frame["seed"]) == {config.train.seed, config.train.seed + 1}
    assert (curve["cost"] - curve["budget"]).abs()[curve["met"]].max() <= 0.005 + 1e-9
    assert (
        frame["nll_conservative"] - frame["nll_argmax"] - frame["difference"]
    ).abs().max() < 1e-4
    assert (tmp_path / "out" / "dial.png").stat().st_size > 10_000
    made = json.loads((tmp_path / "out" / "dial.json").read_text())
    assert made["verdict"].startswith("2 seeds") and len(made["runs"]) == 2

    monkeypatch.setattr("sys.argv", ["dial", str(finished_run), str(finished_run), *options])
    with pytest.raises(SystemExit):
        dial.main()


def test_the_error_is_between_seeds() -> None:
    frame = pd.DataFrame(
        {
            "threshold": 0.6,
            "budget": [0.2, 0.2, None],
            "difference": [1.0, 3.0, 5.0],
            "standard_error": 9.0,
        }
    )
    table = dial.pooled(frame.assign(cost=0.2, nll_conservative=1.0, nll_argmax=1.0)).set_index("n")
    assert table.loc[2, "difference"] == 2.0 and table.loc[2, "standard_error"] == pytest.approx(
        1.0
    )
    assert table.loc[1, "standard_error"] == 9.0  # one seed: over windows
