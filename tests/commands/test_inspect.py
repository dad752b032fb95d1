"""`bayes-router inspect` without colours: every expert has a mark of its own, and the legend says which."""

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
    text = render(fitted, shown, 0, 0.7, colour=False)
    legend, body = text.splitlines()[0], text.splitlines()[-2:]
    marks = dict(re.findall(r"(\w): (\w+) ", legend))
    assert [marks[mark] for mark in body[1][:3]] == names and body[0] == "abcd"
    assert body[1][3] == body[1][2].upper()  # the token in doubt
    assert "1 of 4 tokens marked" in text


def test_the_command_prints_the_legend(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(finished_run), "--tokens", "40", "--device", "cpu"]) == 0
    assert re.search(r"layer 0: f: full .*  g: gated .*  l: local ", capsys.readouterr().out)
