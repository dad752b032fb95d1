import shutil
import sys

import pandas as pd
import pytest

from analysis import judged, posterior
from bayes_router.diagnostics import examine

QUICK = examine.Effort(512, 4, 3, 2, 100, (1, 4), 2, 16, 4, 2)


@pytest.mark.parametrize(
    ("part", "tables", "figures"),
    [
        (
            "collapse",
            {"collapse_by_layer", "collapse_over_training"},
            {"load_by_layer", "route_information"},
        ),
        ("prior", {"prior_by_layer"}, {"simplex"}),
        (
            "uncertainty",
            {"regret", "reliability", "k_hat", "other_text", "figures_to_quote"},
            {"reliability", "k_hat"},
        ),
        ("evidence", {"evidence"}, set()),
        ("confidence", {"confidence", "confidence_regret"}, {"confidence_reliability"}),
        ("risk", {"risk"}, set()),
        ("quality", {"quality"}, set()),
        ("guard", {"guard", "decoding"}, set()),
    ],
)
def test_each_part_writes_its_tables_and_figures(
    part, tables, figures, finished_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(posterior, "Effort", lambda tokens: QUICK)
    monkeypatch.setattr(judged, "RESPLITS", 5)
    run = shutil.copytree(finished_run, tmp_path / "run")  # the risk that it fits stays in the run
    other = tmp_path / "other.txt"
    other.write_text("Es war einmal ein Mann. " * 50)
    arguments = [
        "--parts",
        part,
        "--out",
        str(tmp_path / "out"),
        "--tokens",
        "512",
        "--windows",
        "8",
        "--pairs",
        "8",
    ]
    arguments += ["--draws", "4", "--risk-steps", "10"]
    monkeypatch.setattr(sys, "argv", ["posterior", str(run), *arguments, "--text", f"tale={other}"])
    posterior.main()
    told = capsys.readouterr()
    assert "left out" not in told.err and str(tmp_path / "out") in told.out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{t}.csv" for t in tables} <= written
    assert {f"{f}.{suffix}" for f in figures for suffix in ("pdf", "png")} <= written
    assert all(len(pd.read_csv(tmp_path / "out" / f"{t}.csv")) for t in tables)
    if part == "guard":
        decoded = pd.read_csv(tmp_path / "out" / "decoding.csv")
        assert (decoded["as one pass"] == 1).all() and {"held out", "tale"} <= set(decoded["text"])
        assert decoded["lost"].abs().max() < 1e-4
    if part == "evidence":
        assert {"code", "German", "shuffled", "tale"} == set(
            pd.read_csv(tmp_path / "out" / "evidence.csv")["text"]
        )


def test_without_arviz_stats_the_rest_is_written(finished_run, tmp_path, monkeypatch, capsys):
    for name in ("arviz_stats", "arviz_stats.base"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(posterior, "Effort", lambda tokens: QUICK)
    arguments = ["--parts", "uncertainty", "--out", str(tmp_path / "out"), "--tokens", "512"]
    monkeypatch.setattr(sys, "argv", ["posterior", str(finished_run), *arguments])
    posterior.main()
    told = capsys.readouterr()
    assert "left out: guide: pareto_k: expected the package arviz-stats" in told.out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"regret.csv", "reliability.csv", "figures_to_quote.csv"} <= written
    assert "k_hat.csv" not in written and told.err.count("Traceback") == 0
