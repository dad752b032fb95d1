"""The clock of a patched model.

Every contender has its rows, and costs are those of the routes that it executed.
"""

import functools
from pathlib import Path

import pandas as pd
import pytest

from analysis.pretrained import speed as patch_speed
from bayes_router.integrations.patching import patch


@pytest.mark.filterwarnings("ignore")
def test_every_contender_is_timed_and_costs_what_it_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = functools.partial(patch, sinks=0, experts=("full", "local"), window=16)
    monkeypatch.setattr(
        patch_speed, "patch", lambda model, context, **_: narrow(model, context=context)
    )
    path = tmp_path / "rows.csv"
    options = [
        "--lengths",
        "256",
        "--turns",
        "1",
        "--budgets",
        "0.5",
        "--results",
        str(path),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr("sys.argv", ["patch_speed", *options])
    patch_speed.main()
    rows = pd.read_csv(path)
    assert rows.groupby(["what", "context", "batch"]).size().tolist() == [3, 3, 3]
    assert set(rows["context"]) == {256, 256 - patch_speed.SHORTER}
    cost = rows.set_index(["what", "contender"])["cost"]
    assert (cost.drop("random 0.5", level="contender") == 1).all()
    read = (16 * 17 / 2 + 240 * 16) / (256 * 257 / 2)  # keys of a window of 16 over all
    assert cost["prefill", "random 0.5"] == pytest.approx((1 + read) / 2, abs=0.05)
    assert (cost["decode", "random 0.5"] < 0.95).all()
    assert (rows["ms"] > 0).all() and (rows["ratio"] > 0).all()
