"""What a report says first, its map, its tables as CSV, two fits beside each other."""

import base64
import csv
import io
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from bayes_router import __version__
from bayes_router.cli import main
from bayes_router.config import with_changes
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.beside import Page, difference, write_beside
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.fitted import FittedRun, load_fitted
from bayes_router.diagnostics.measures import rivals
from bayes_router.diagnostics.measures.rivals import against_static, sentence
from bayes_router.diagnostics.report import write_report
from bayes_router.diagnostics.shown import route_text
from bayes_router.diagnostics.tables import unit_tables
from bayes_router.routing.policy import Budget
from bayes_router.training.executed import Executed, execute
from bayes_router.training.fit import fit
from bayes_router.types import RoutingMode
from tests.diagnostics.browser import chromium, find_chromium
from tests.tiny import fit_config

TEXT = ("The state of the Union is strong. " * 5).encode()
browsing = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def by_head(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two layers and two units."""
    out = tmp_path_factory.mktemp("units") / "run"
    changes = {"model.route_by": "head", "data.eval_tokens": 64, "train.eval_every": 1}
    fit(with_changes(fit_config(corpus, steps=2), changes), out, progress=False)
    return out


@pytest.fixture(scope="module")
def examined(by_head: Path) -> Examination:
    return Examination(load_fitted(by_head), effort=Effort(tokens=256))


@pytest.fixture(scope="module")
def html(examined: Examination) -> str:
    return write_report(examined, TEXT, quick=True)


def test_it_begins_with_loss_cost_elbo_command_settings_and_versions(
    html: str, examined: Examination, by_head: Path
) -> None:
    summary = json.loads((by_head / "summary.json").read_text(encoding="utf-8"))
    head = html[: html.index("<h2>Verdicts</h2>")]
    assert f"HARD {summary['nll']['hard']:.4f}" in head and f"{summary['elbo']:.4f}" in head
    assert f"{summary['executed_cost']['paper']:.3f} in the paper&#39;s units" in head
    assert f"bayes-router report {by_head}" in head and "bayes-router fit --config" in head
    assert "<td>model.route_by</td><td>head</td>" in head
    assert f"<td>bayes-router</td><td>{__version__}</td>" in head and torch.__version__ in head
    assert "n = 256 tokens in 8 windows" in html  # below each verdict
    for term in ("KL to the prior", "ELBO", "executed cost", "price"):
        assert f"Over training: {term}" in html


def test_the_packed_units_are_what_the_model_did(examined: Examination) -> None:
    shown = route_text(examined.run, TEXT)
    packed = unit_tables(shown)
    assert shown.choice is not None and shown.mean is not None
    assert len(packed) == 2 and len(packed[0]) == 2
    one = packed[1][1]
    assert one["choice"] == "".join(map(str, shown.choice[1, 1].tolist()))
    means = torch.tensor(list(base64.b64decode(one["mean"]))).view(-1, 3) / 255
    torch.testing.assert_close(means.double(), shown.mean[1, 1], atol=0.002, rtol=0)
    own = route_text(examined.run, TEXT, unit=1)
    assert torch.equal(own.hard_choice, shown.choice[:, 1])


def test_static_rivals_are_what_a_forced_pass_loses(examined: Examination) -> None:
    run, rows = examined.run, examined.rows(8)
    table = against_static(run.model, rows, run.prior.cost_ratio, run.experts).set_index("name")

    def lost(half: list[Batch]) -> float:
        tokens, targets = (torch.cat(part) for part in zip(*half, strict=True))
        logits = run.model(tokens, force="local").logits.detach()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))

    local = table.loc["all on local"]
    assert local["nll"] == pytest.approx(lost(rows[1::2]), abs=1e-5)
    assert table.loc["all on full", "cost"] == 1
    dial = table[table["kind"] == "dial"]
    assert dial["cost"].max() > 0.9 and dial["cost"].min() == pytest.approx(0.15, abs=1e-6)
    # chosen on the first half alone: with other words there, the other half's figures stay
    held = dial[dial["cost"].round(3) == float(local["against"].split()[-1])]
    assert local["behind"] == pytest.approx(local["nll"] - held["nll"].iloc[0], abs=1e-6)
    assert local["behind_there"] == pytest.approx(lost(rows[::2]) - _best(run, rows[::2]), abs=1e-5)
    assert table["low"].lt(table["nll"]).all() and table["high"].gt(table["nll"]).all()
    with pytest.raises(ValueError, match="windows: expected at least four; got 3"):
        against_static(run.model, rows[:3], run.prior.cost_ratio, run.experts)


def _best(run: FittedRun, half: list[Batch]) -> float:
    """The least loss of the dial on these windows, at no more than the cost of local."""
    ratio, read = run.prior.cost_ratio, []
    for price in rivals.PRICES:
        policy = Budget(tuple(ratio.tolist()), price)
        read.append(execute(run.model, half, ratio, RoutingMode.HARD, policy, price).reading)
    return min(one.nll for one in read if one.cost <= 0.3 + 1e-6)


def test_the_strongest_rival_is_chosen_on_the_other_half() -> None:
    """The one that looks best where it is read is not the one that is named."""
    table = pd.DataFrame(
        {
            "name": ["fit", "lucky here", "strong there"],
            "kind": ["dial", "static", "static"],
            "windows": 12,
            "behind": [math.nan, -0.5, -0.1],
            "behind_low": [math.nan, -0.6, -0.2],
            "behind_high": [math.nan, -0.4, 0.1],
            "behind_there": [math.nan, 0.3, -0.2],
        }
    )
    good, text = sentence(table)
    assert good and "'strong there', loses -0.100 nats (95% -0.200 to +0.100, n = 12" in text
    good, text = sentence(table.assign(behind_there=[math.nan, -0.3, -0.2]))
    assert not good and "'lucky here', loses -0.500" in text


@browsing
def test_the_map_is_walked_by_keys_and_enter_shows_the_unit(html: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(html, encoding="utf-8")
    with chromium(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        # at first all units of the layer whose tokens decide most
        told = "data.heat.find(one => one.name === 'route information').values"
        sums = f"{told}.map(row => row.reduce((a, b) => a + b))"
        most = browser.run(f"{sums}.indexOf(Math.max(...{sums}))")
        begun = browser.run("[layer, unit, select.value, unitSelect.value].join()")
        assert begun == f"{most},-1,{most},-1"
        reached = []
        for _ in range(60):  # what Tab reaches, in order
            browser.call("Input.dispatchKeyEvent", type="rawKeyDown", key="Tab", code="Tab",
                         windowsVirtualKeyCode=9)  # fmt: skip
            reached.append(
                browser.run(
                    "(e => e.id || e.dataset.l && 'cell' || e.className || e.tagName)"
                    "(document.activeElement)"
                )
            )
            if reached[-1] == "cell":
                break
        assert reached.count("SUMMARY") == 2 and reached.index("shown") < reached.index("cell")
        at = "[document.activeElement.dataset.l, document.activeElement.dataset.u].join()"
        browser.key("ArrowDown")
        browser.key("ArrowRight")
        assert browser.run(at) == "1,1"
        browser.key("ArrowRight")
        assert browser.run(at) == "1,1"  # the edge
        before = browser.run("tokens.map(t => t.style.background).join()")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter",
                     windowsVirtualKeyCode=13, text="\r")  # fmt: skip
        assert browser.run("[layer, unit, select.value, unitSelect.value].join()") == "1,1,1,1"
        assert browser.run("tableOf().choice.join('') === data.units[1][1].choice")
        assert browser.run("tokens.map(t => t.style.background).join()") != before
        assert browser.run("document.activeElement.dataset.i") == "0"
        assert "layer 1, unit 1" in browser.run("document.getElementById('card').textContent")
        assert browser.run("cellAt(1, 1).getAttribute('aria-pressed')") == "true"
        # all units: the share of them on each expert, as their choices say
        heads = "data.units[1].map(one => Number(one.choice[i]))"
        share = f"{heads}.filter(c => c === e).length / data.units[1].length"
        shares = f"data.pieces.map((_, i) => data.experts.map((_, e) => 1000 * {share}))"
        browser.run("unitSelect.value = -1; unitSelect.dispatchEvent(new Event('change'))")
        same = f"JSON.stringify(tableOf().mean) === JSON.stringify({shares})"
        assert browser.run(same) is True
        assert "share of its units" in browser.run("document.getElementById('card').textContent")
        assert browser.problems() == []


CONTRAST = """(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => c <= 0.04045 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4);
  const weights = [0.2126, 0.7152, 0.0722];
  const light = rgb => weights.reduce((sum, w, i) => sum + w * linear(rgb[i] / 255), 0);
  const behind = e => { // what stands behind the text of e, colours laid over one another
    const own = channels(getComputedStyle(e).backgroundColor), a = own.length > 3 ? own[3] : 1;
    if (a === 1 || e === document.documentElement) return own;
    const below = behind(e.parentElement);
    return [0, 1, 2].map(i => a * own[i] + (1 - a) * below[i]);
  };
  return Math.min(...Array.from(document.querySelectorAll("#text span, #map button, .key"), e => {
    const two = [light(channels(getComputedStyle(e).color)), light(behind(e))];
    return (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
  }));
})()"""


@browsing
def test_text_is_legible_on_every_colour_in_light_and_dark(html: str, tmp_path: Path) -> None:
    """A contrast of 4.5 (WCAG 2.2, AA) where every posterior is as certain as it can be."""
    page = tmp_path / "page.html"
    page.write_text(html, encoding="utf-8")
    with chromium(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        browser.run("data.layers.forEach(l => { l.sure = l.sure.map(() => 1000); })")
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.call("Emulation.setEmulatedMedia", features=[feature])
            for expert in range(3):
                browser.run(f"data.layers[0].choice.fill({expert}); paint(); drawMap();")
                assert browser.run(CONTRAST) >= 4.5, (scheme, expert)


@browsing
def test_every_table_is_had_as_csv_and_dark_is_dark(html: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(html, encoding="utf-8")
    with chromium(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        tables = browser.run("document.querySelectorAll('table').length")
        assert tables >= 5 and browser.run("document.querySelectorAll('.csv').length") == tables
        wanted = browser.run(
            "Array.from(document.querySelector('[data-name=settings]').rows, "
            "r => Array.from(r.cells, c => c.textContent))"
        )
        text = browser.run("csvOf(document.querySelector('[data-name=settings]'))")
        assert list(csv.reader(io.StringIO(text))) == wanted and len(wanted) > 50
        odd = "(t => { t.innerHTML = '<tr><td>a,\"b\"</td><td>c</td></tr>'; return csvOf(t); })"
        assert browser.run(odd + "(document.createElement('table'))") == '"a,""b""",c\n'
        paper = "getComputedStyle(document.body).backgroundColor"
        assert browser.run(paper) == "rgb(255, 255, 255)"
        dark = {"name": "prefers-color-scheme", "value": "dark"}
        browser.call("Emulation.setEmulatedMedia", features=[dark])
        assert browser.run(paper) == "rgb(20, 24, 30)"
        assert browser.run("getComputedStyle(document.body).color") == "rgb(230, 234, 240)"
        browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800,
                     deviceScaleFactor=1, mobile=True)  # fmt: skip
        assert browser.run("document.documentElement.scrollWidth") <= 400
        assert browser.problems() == []


def test_two_fits_are_compared_on_the_same_text_alone(
    examined: Examination, by_head: Path, html: str
) -> None:
    again = Examination(load_fitted(by_head), effort=Effort(tokens=256))
    with torch.no_grad():
        again.run.model.network.embed.weight.mul_(1.05)
    _ = again.collapse
    found = re.search(
        r"first: ([+-][\d.]+) nats per token \(95% ([+-][\d.]+) to ([+-][\d.]+), paired over 8",
        difference(examined, again),
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(again.nll - examined.nll, abs=1e-4)
    assert float(found[2]) <= float(found[1]) <= float(found[3])
    again.window_print = again.window_print + 1
    assert difference(examined, again).startswith("They were read on other texts")
    page = write_beside(Page("<one>", examined, html), Page("two", again, html))
    assert "<one>" not in page and page.count("<iframe") == 2 and "srcdoc=" in page


def test_the_command_takes_two(
    by_head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["report", str(by_head), str(by_head), "--quick", "--device", "cpu"]
    assert main(arguments) == 2
    assert "out: expected a file for two runs" in capsys.readouterr().err
    assert main(["report", str(by_head), str(tmp_path / "no"), "--out", "x.html"]) == 2
    assert "run: expected a run folder" in capsys.readouterr().err
    out = tmp_path / "both.html"
    assert main([*arguments, "--tokens", "40", "--out", str(out)]) == 0
    assert "no difference is shown" in out.read_text(encoding="utf-8")


def test_a_rival_is_compared_with_what_costs_no_more() -> None:
    def reading(cost: float, there: float, here: float, kind: str = rivals.DIAL) -> rivals._Reading:
        one, ones = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2).double()
        both = (Executed(0.0, cost, torch.ones(1, 2), one + nll, ones) for nll in (there, here))
        return rivals._Reading("", kind, *both)

    # the second point looks better here alone; the third costs too much
    dial = [reading(0.2, 5.0, 5.0), reading(0.25, 6.0, 1.0), reading(0.9, 1.0, 1.0)]
    row = rivals._row(reading(0.3, 4.0, 4.5, rivals.STATIC), dial)
    assert row["against"] == "dial at 0.200" and row["behind"] == pytest.approx(-0.5)
    assert row["behind_there"] == pytest.approx(-1.0)
