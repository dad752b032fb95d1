import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from bayes_router.cli import main
from bayes_router.commands.inspect import printable
from bayes_router.diagnostics import report
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.figures import posterior as posterior_plots
from bayes_router.diagnostics.figures import run as plots
from bayes_router.diagnostics.figures import verdicts as verdict_plots
from bayes_router.diagnostics.fitted import load_fitted
from bayes_router.diagnostics.report import write_report
from bayes_router.diagnostics.shown import route_text
from tests.diagnostics.browser import chromium, find_chromium

HOSTILE = (
    "<script>document.title='run'</script> & \"quoted\" </script><img src=x onerror=alert(1)> "
    "naïve\n"
) * 8
SMALL = Effort(None, 4, 3, 2, 100, (1, 4, 64), 2, 16, 4, 2)


@pytest.fixture(scope="module")
def examined(finished_run):
    return Examination(load_fitted(finished_run), effort=SMALL)


@pytest.fixture(scope="module")
def page(examined, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(write_report(examined, HOSTILE.encode(), name="<b>name</b>"), encoding="utf-8")
    return path


def test_the_page_is_self_contained_and_escaped(page, examined):
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["']?(?!data:)\w""", html.split("<script type")[0])
    assert (
        "<script>document" not in html
        and "<b>name" not in html
        and "onerror=alert" not in html.split("<script type")[0]
    )
    assert html.count("</script>") == 2  # its own: the data, the code
    order = ("<h2>In short", "<h2>Verdicts", "<h2>Figures", "The text, token by token")
    assert [html.index(part) for part in order] == sorted(html.index(part) for part in order)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))
    assert "".join(data["pieces"]) == HOSTILE and len(data["layers"]) == 2
    assert all(len(layer["choice"]) == len(data["pieces"]) for layer in data["layers"])
    for verdict in examined.verdicts():
        assert verdict.topic in html


def test_the_page_holds_what_the_model_says(page, examined):
    shown = route_text(examined.run, HOSTILE.encode())
    data = json.loads(
        re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S).group(1)
    )
    context = examined.run.config.data.context
    tokens = torch.tensor(list(HOSTILE.encode()[:context]))[None]
    out = examined.run.model(tokens, "hard")
    assert data["layers"][1]["choice"][:context] == out.route[1, 0, :, 0].tolist()
    mean = out.concentration[0, 0, 5, 0] / out.concentration[0, 0, 5].sum()
    assert data["layers"][0]["mean"][5] == pytest.approx((1000 * mean).tolist(), abs=0.51)
    nll = torch.nn.functional.cross_entropy(out.logits[0, :-1], tokens[0, 1:], reduction="none")
    torch.testing.assert_close(shown.nll[1:context], nll.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
def test_the_page_works_in_a_browser(page, tmp_path):
    with chromium(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        assert (
            browser.run("document.title").startswith("Routing posterior")
            and browser.run("tokens.length") > 500
        )
        colours = (
            "Array.from(document.querySelectorAll('#text span')).map(s => "
            "s.style.background).join()"
        )
        first = browser.run(colours)
        browser.run(
            "(s => { s.value = '1'; s.dispatchEvent(new Event('change')); "
            "})(document.getElementById('layer'))"
        )
        assert browser.run(colours) != first and browser.run("text.dataset.layer") == "1"
        assert browser.run("document.getElementById('card').hidden")
        browser.run("document.getElementById('text').scrollIntoView()")
        browser.run(
            "new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))"
        )
        box = browser.run(
            "(b => [b.x + b.width / 2, b.y + b.height / 2])(tokens[7].getBoundingClientRect())"
        )
        browser.mouse(*box)
        card = "document.getElementById('card').textContent"
        assert (
            "Token 7:" in browser.run(card)
            and "%" in browser.run(card)
            and "layer 1" in browser.run(card)
        )
        browser.run("tokens[0].focus()")
        browser.key("ArrowRight")
        assert (
            "Token 1:" in browser.run(card)
            and browser.run("document.activeElement.dataset.i") == "1"
        )
        assert browser.run("document.querySelectorAll('#text script, #text img').length") == 0
        # a token of many characters is text too
        assert browser.run("make('span', '<img src=x>').children.length") == 0
        assert browser.problems() == []


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
def test_twenty_thousand_tokens_are_painted_without_lag(examined, tmp_path):
    page = tmp_path / "long.html"
    page.write_text(
        write_report(examined, b"The union of these States. \n" * 750, 20_000, True),
        encoding="utf-8",
    )
    with chromium(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        assert browser.run("tokens.length") == 20_000
        script = (
            "(() => { const t = performance.now(); paint(); text.getBoundingClientRect(); return "
            "performance.now() - t; })()"
        )
        assert min(browser.run(script) for _ in range(3)) < 1000  # 150 ms on an idle machine
        assert browser.problems() == []


def test_figures_have_axes_with_names(examined, finished_run):
    layers, experts = examined.collapse.layers(), examined.run.experts
    positions, kinds = examined.uncertainty.positions(), examined.uncertainty.kinds_frame()
    calibration = examined.calibration
    drawn = [
        posterior_plots.plot_load_by_layer(layers, experts),
        posterior_plots.plot_by_position(positions),
        posterior_plots.plot_by_kind(kinds, "mutual_information"),
        verdict_plots.plot_reliability(calibration.before, calibration.after),
        verdict_plots.plot_collapse_over_training(examined.training),
        verdict_plots.plot_k_hat(examined.k_hat),
        verdict_plots.plot_other_text(examined.other_text),
        plots.plot_cost(pd.read_csv(finished_run / "metrics.csv")),
    ]
    for ax in drawn:
        assert ax.get_xlabel() and ax.get_ylabel()
    said = verdict_plots.plot_reliability(calibration.before, calibration.after, mended="fitted")
    assert "fitted" in {text.get_text() for text in said.get_legend().get_texts()}
    simplex = posterior_plots.plot_simplex_density(
        torch.rand(50, 3) + 0.1, torch.rand(20, 3), experts
    )
    assert {text.get_text() for text in simplex.texts} == set(experts)
    with pytest.raises(ValueError, match="experts: expected three"):
        posterior_plots.plot_simplex_density(torch.ones(5, 2), torch.ones(5, 2), ["a", "b"])
    plots.plt.close("all")


def test_the_examination_is_complete(examined):
    figures = examined.figures()
    assert figures.notna().sum() > 15 and {"ECE", "temperature"} <= set(figures.index)
    assert len({verdict.topic for verdict in examined.verdicts()}) >= 5
    assert list(examined.k_hat["length"].unique()) == [1, 4]  # 64 exceeds the context


def test_commands_write_and_print(finished_run, tmp_path, capsys):
    text, out = tmp_path / "a.txt", tmp_path / "a.html"
    text.write_text("A text\x1b[31m of\ttwo lines,\nno more.\n" * 3, encoding="utf-8")
    run = str(finished_run)
    assert (
        main(["report", run, "--text", str(text), "--out", str(out), "--quick", "--device", "cpu"])
        == 0
    )
    assert out.is_file() and str(out) in capsys.readouterr().out
    assert (
        main(
            [
                "inspect",
                run,
                "--text",
                str(text),
                "--layer",
                "1",
                "--colour",
                "never",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "·[31m of two lines," in printed and "tokens marked" in printed
    lines = printed.splitlines()
    at = lines.index("A text·[31m of two lines,")
    assert len(lines[at + 1]) == len(lines[at]) and set(lines[at + 1].lower()) <= set("fgl")
    assert main(["inspect", run, "--colour", "always", "--tokens", "40", "--device", "cpu"]) == 0
    assert re.search(r"\x1b\[(48|4;38);5;", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "RUN", "--layer", "7"], "layer: expected 0 to 1; got 7"),
        (
            ["inspect", "RUN", "--colour", "sometimes"],
            "colour: expected one of always, auto, never",
        ),
        (["inspect", "RUN", "--threshold", "2"], "threshold: expected a probability"),
        (
            ["inspect", "RUN", "--text", "EMPTY"],
            "text: expected at least one token; got 'an empty text'",
        ),
        (["report", "RUN", "--text", "MISSING"], "text: expected a file"),
        (
            ["report", "RUN", "--out", "MISSING/a.html"],
            "out: expected a file in an existing folder",
        ),
        (["report", "MISSING"], "run: expected a run folder"),
        (["report", "GUIDELESS"], "run: expected a fitted guide"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, finished_run, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    guideless = tmp_path / "guideless"
    shutil.copytree(finished_run, guideless)
    weights = load_file(guideless / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("controller.")},
        guideless / "model.safetensors",
    )
    places = {
        "RUN": finished_run,
        "EMPTY": tmp_path / "empty.txt",
        "MISSING": tmp_path / "no",
        "GUIDELESS": guideless,
    }
    filled = [re.sub("|".join(places), lambda m: str(places[m.group()]), a) for a in arguments]
    assert main([*filled, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\tb\n") == "a·[2J b\n" and printable("") == "·"


def test_the_template_is_packaged():
    assert (Path(report.__file__).parent / "report.html.j2").is_file()
