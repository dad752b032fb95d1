"""`bayes-router inspect` without colours.

Every expert has a mark of its own, and the legend says which.
"""

import re
from pathlib import Path

import pytest
import torch

from bayes_router.cli import main
from bayes_router.commands.inspect import letters, render
from bayes_router.diagnostics.fitted import load_fitted
from bayes_router.diagnostics.report import ShownText


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


def test_the_command_prints_the_legend(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(finished_run), "--tokens", "40", "--device", "cpu"]) == 0
    assert re.search(r"layer 0: f: full .*  g: gated .*  l: local ", capsys.readouterr().out)


def test_colour_and_picture_say_the_same(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg = tmp_path / "routes.svg"
    arguments = ["--tokens", "40", "--device", "cpu", "--colour", "always", "--svg", str(svg)]
    assert main(["inspect", str(finished_run), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[97;48;5;25m full " in printed  # the legend, on the colours of the figures
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    drawn = " ".join(re.findall(r">([^<]*)</text>", svg.read_text(encoding="utf-8"))).replace("&#160;", " ")
    assert re.findall(r"\d+ of \d+ tokens marked", plain)[0] in drawn and "@font-face" not in svg.read_text(encoding="utf-8")
