import importlib
import sys

import pandas as pd
import pytest

from bayes_router.diagnostics import examine

QUICK = examine.Effort(512, 4, 3, 2, 100, (1, 4), 2, 16, 4, 2)


@pytest.mark.parametrize(
    ("name", "tables", "figures"),
    [
        ("collapse", {"collapse_by_layer", "collapse_over_training"}, {"load_by_layer", "route_information"}),
        ("prior", {"prior_by_layer"}, {"simplex"}),
        ("uncertainty", {"regret", "reliability", "k_hat", "other_text", "figures_to_quote"}, {"reliability", "k_hat"}),
    ],
)
def test_studies_of_a_run_write_tables_and_figures(name, tables, figures, finished_run, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"analysis.{name}")
    monkeypatch.setattr(module, "Effort", lambda tokens: QUICK, raising=False)
    monkeypatch.setattr(sys, "argv", [name, str(finished_run), "--out", str(tmp_path / "out"), "--tokens", "512"])
    module.main()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{t}.csv" for t in tables} <= written
    assert {f"{f}.{suffix}" for f in figures for suffix in ("pdf", "png")} <= written
    assert all(len(pd.read_csv(tmp_path / "out" / f"{t}.csv")) for t in tables)
    assert str(tmp_path / "out") in capsys.readouterr().out
