"""`bayes-router inspect` without colours.

Every expert has a mark of its own, and the legend says which.
"""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from bayes_router.cli import main
from bayes_router.commands.inspect import letters, of_heads, render, shaded
from bayes_router.diagnostics.fitted import load_fitted
from bayes_router.diagnostics.shading import scale
from bayes_router.diagnostics.shown import ShownText, route_text
from bayes_router.routing.risk import Risk, RiskHead
from bayes_router.routing.watch import watching
from bayes_router.training.risk import read_risk


def test_every_expert_has_a_letter_of_its_own() -> None:
    assert letters(["full", "linear", "local"]) == ["f", "l", "o"]
    assert letters(["a", "a1", "1a", "2"]) == ["a", "b", "c", "d"]
    many = letters([f"expert {n}" for n in range(26)])
    assert len(set(many)) == 26


def test_marks_and_legend_agree(finished_run: Path) -> None:
    fitted = load_fitted(finished_run)
    names = fitted.experts
    shown = ShownText(
        ["a", "b", "c", "d"],
        torch.tensor([[[9.0, 0.1, 0.1], [0.1, 9.0, 0.1], [0.1, 0.1, 9.0], [1.0, 1.0, 1.0]]]),
        torch.tensor([[0, 1, 2, 2]]),
        torch.zeros(4),
    )
    text = render(fitted, shown, 0, 0.7, colour=False).plain
    legend, body = text.splitlines()[0], text.splitlines()[-2:]
    marks = dict(re.findall(r"(\w): (\w+) ", legend))
    assert [marks[mark] for mark in body[1][:3]] == names and body[0] == "abcd"
    assert body[1][3] == body[1][2].upper()  # the token in doubt
    assert "1 of 4 tokens marked" in text


def test_the_command_prints_the_legend(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(finished_run), "--tokens", "40", "--device", "cpu"]) == 0
    assert re.search(r"layer 0: f: full .*  g: gated .*  l: local ", capsys.readouterr().out)


def test_a_table_says_what_is_known_of_each_token(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted, file = load_fitted(finished_run), tmp_path / "there" / "tokens.csv"
    text = tmp_path / "text.txt"
    text.write_text('a,b\n"c" \u00e9', encoding="utf-8")
    arguments = ["--text", str(text), "--device", "cpu", "--table", str(file)]
    assert main(["inspect", str(finished_run), *arguments]) == 2  # nothing is read for no file
    assert "table: expected" in capsys.readouterr().err
    file.parent.mkdir()
    assert main(["inspect", str(finished_run), *arguments]) == 0
    table = pd.read_csv(file, keep_default_na=False)
    shown = route_text(fitted, text.read_bytes(), 800)
    L, N, _ = shown.concentration.shape
    assert table["piece"].tolist() == shown.pieces * L
    assert table["layer"].tolist() == [layer for layer in range(L) for _ in range(N)]
    for index, name in enumerate(fitted.experts):
        mean = (shown.concentration / shown.concentration.sum(-1, keepdim=True))[..., index]
        assert table[f"mean_{name}"].tolist() == pytest.approx(mean.flatten().tolist(), rel=1e-4)
        assert table[f"low_{name}"].le(table[f"high_{name}"]).all()


def test_colour_and_picture_say_the_same(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg = tmp_path / "routes.svg"
    arguments = ["--tokens", "40", "--device", "cpu", "--colour", "always", "--svg", str(svg)]
    assert main(["inspect", str(finished_run), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[97;48;5;25m full " in printed  # the legend, on the colours of the figures
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    drawn = " ".join(re.findall(r">([^<]*)</text>", svg.read_text(encoding="utf-8"))).replace(
        "&#160;", " "
    )
    assert re.findall(r"\d+ of \d+ tokens marked", plain)[
        0
    ] in drawn and "@font-face" not in svg.read_text(encoding="utf-8")


def test_a_text_is_shaded_by_a_number_of_each_token() -> None:
    numbers = {"risk": torch.tensor([0.0, 0.005, 0.02, 0.05, 0.3])}
    shown = ShownText(
        list("abcde"),
        torch.ones(1, 5, 3),
        torch.zeros(1, 5, dtype=torch.int64),
        torch.zeros(5),
        numbers,
    )
    text = shaded(shown, scale("risk"), colour=False).plain
    assert text.splitlines()[-2:] == ["abcde", "01234"] and "mean 0.0750" in text
    coloured = shaded(shown, scale("risk"), colour=True)
    assert (
        len(
            {str(span.style) for span in coloured.spans if span.start > coloured.plain.rindex("\n")}
        )
        == 5
    )
    with pytest.raises(
        ValueError,
        match="by: expected route: the fit keeps no estimate of the other; got 'foreign'",
    ):
        shaded(shown, scale("foreign"), colour=False)
    with pytest.raises(
        ValueError, match="by: expected one of foreign, heads, risk, route; got 'doubt'"
    ):
        scale("doubt")


def test_what_colours_a_token_is_that_of_a_pass_of_its_own(finished_run: Path) -> None:
    run = load_fitted(finished_run)
    width, layers, context = (
        run.config.model.d_model,
        run.config.model.num_layers,
        run.config.data.context,
    )
    run.model.controller.risk = Risk(RiskHead(width + layers * len(run.experts) + 2))
    text = b"The state of the union is strong. " * 3
    shown, first = route_text(run, text, 60), torch.tensor([list(text[:context])])
    torch.testing.assert_close(shown.numbers["risk"][:context], read_risk(run.model, first)[0])
    with watching(run.model.controller) as watch:
        run.model(first)
    budget = torch.stack([layer.log_budget for layer in run.model.controller.evidence.layers])
    expected = (budget[:, None] - watch.log_evidence[:, 0]).mean(0)
    torch.testing.assert_close(shown.numbers["foreign"][:context], expected)


def test_the_command_colours_by_how_foreign_a_text_is(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", str(finished_run), "--tokens", "40", "--device", "cpu", "--by"]
    assert main([*arguments, "foreign"]) == 0
    assert "foreign, nats by which" in capsys.readouterr().out
    assert main([*arguments, "risk"]) != 0
    assert "by: expected route: the fit keeps no estimate" in capsys.readouterr().err


def test_a_token_is_coloured_by_the_share_of_heads_that_look_far() -> None:
    choice = torch.tensor([[[0, 1, 1], [0, 0, 1]], [[1, 1, 1], [1, 1, 0]]])  # [L, R, N]
    shown = ShownText(["a", "b", "c"], torch.ones(2, 3, 2), choice[:, 0], torch.zeros(3))
    shown = shown._replace(choice=choice)
    page = shaded(of_heads(shown, 0, dearest=0), scale("heads"), colour=False).plain
    assert page.endswith("abc\n420") and "mean 0.5000" in page
    page = shaded(of_heads(shown, 1, dearest=0), scale("heads"), colour=False).plain
    assert page.endswith("abc\n002")
