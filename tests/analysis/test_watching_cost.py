"""What evidence costs is read, and nothing is run where nobody asks."""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from analysis.speed import watching as study
from bayes_router.routing import watch


def run(monkeypatch: Any, path: Path) -> pd.DataFrame:
    monkeypatch.setattr(study, "FITTED", 1200)
    sizes = ("--tokens", 48, "--layers", 2, "--rounds", 3, "--results", path)
    monkeypatch.setattr(sys, "argv", ["watching", *map(str, sizes)])
    study.main()
    return pd.read_csv(path)


def test_each_pass_is_read_beside_the_plain_one(tmp_path: Path, monkeypatch: Any) -> None:
    table = run(monkeypatch, tmp_path / "watching.csv").set_index("pass")
    assert list(table.index) == ["plain", "watched", "guarded"]
    assert table.loc["plain", "over plain"] == 1 and (table["ms"] > 0).all()
    assert (table["low"] <= table["over plain"]).all() and (table["rounds"] == 3).all()


def test_a_density_that_works_where_nobody_asks_is_noticed(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def always(router: Any, tokens: torch.Tensor, count: Any = study.operators) -> int:
        if router.controller.evidence is None:
            return int(count(router, tokens))
        with watch.watching(router.controller):
            return int(count(router, tokens))

    monkeypatch.setattr(study, "operators", always)
    with pytest.raises(AssertionError, match="where nobody asks"):
        run(monkeypatch, tmp_path / "watching.csv")
