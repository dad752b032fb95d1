"""`report` shows what it can, says what is missing, and never throws away what was read."""

import shutil
import sys
from pathlib import Path

import pytest

from bayes_router.cli import main
from bayes_router.commands import report
from bayes_router.diagnostics.diagnostic import diagnostics
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.figures import posterior
from bayes_router.diagnostics.fitted import load_fitted
from bayes_router.diagnostics.report import write_report
from bayes_router.files import METRICS

SMALL = Effort(512, 4, 3, 2, 100, (1, 4), 1, 16, 2, 2)


@pytest.fixture
def examined(finished_run: Path) -> Examination:
    return Examination(load_fitted(finished_run), effort=SMALL)


def test_without_arviz_stats_the_rest_is_shown(
    examined: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    html = write_report(examined, b"some text to show, and some more of it", quick=False)
    reason = (
        "guide: pareto_k: expected the package arviz-stats; got none; run pip install -e "
        "'.[diagnostics]' in the checkout"
    )
    assert any(line.startswith(reason) for line in examined.left_out())
    assert (
        "Reliability" in html
        and "ECE" in html
        and "arviz-stats" in html
        and "Guide against" not in html
    )
    assert {verdict.topic for verdict in examined.verdicts()} >= {"amortisation"}


def test_ctrl_c_keeps_what_was_read(examined: Examination, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Examination, "gaps", property(interrupted), raising=False)
    examined.read()
    left = examined.left_out()
    assert [line for line in left if line.endswith(": interrupted")] == [
        f"{one.title}: interrupted" for name, one in diagnostics().items() if name != "k_hat"
    ]
    assert (
        "k-hat, joint, 1 tokens (median)" in examined.figures() and "ECE" not in examined.figures()
    )


def test_a_figure_that_cannot_be_drawn_is_left_out(
    examined: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(posterior, "plot_by_position", broken)
    html = write_report(examined, b"some text to show, and some more of it", quick=True)
    assert "figure 'Uncertainty by position': no font at all" in examined.left_out(quick=True)
    assert "no font at all" in html and "Load by layer" in html


@pytest.mark.parametrize("header", ["stap,nll\n1,2\n", "", "step,nll,kl\n\x00\xff,\n"])
def test_a_damaged_log_of_metrics_is_one_line_of_the_report(
    finished_run: Path, tmp_path: Path, header: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / METRICS).write_bytes(header.encode("latin-1"))
    assert main(["report", str(run), "--quick"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("left out: over training")]
    assert f"{run / METRICS}: expected the metrics of this run; it is damaged" in line
    assert (run / "report.html").stat().st_size > 10_000


def test_a_report_whose_place_is_gone_is_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "there" / "r.html"  # its folder went while the text was read
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = report.write_somewhere(out, "<html>")
    (kept,) = tmp_path.glob("*.html")
    assert said == f"{kept}, for {out} could not be written: No such file or directory"
    assert kept.read_text(encoding="utf-8") == "<html>"
    out.parent.mkdir()
    assert report.write_somewhere(out, "<html>") == str(out) and out.read_text() == "<html>"
