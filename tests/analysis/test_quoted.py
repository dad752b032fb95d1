"""The figures of the README are those of the committed results, and one that is changed is found."""

import re

import pytest

from analysis.quoted import ROOT, problems

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_figure_is_in_the_results() -> None:
    assert problems(README) == []


@pytest.mark.parametrize("old, new", [("0.39%", "0.29%"), ("1.273 | 0.001", "1.263 | 0.001"), ("1.11%", "2.11%")])
def test_a_figure_that_was_changed_is_found(old: str, new: str) -> None:
    assert old in README
    assert problems(README.replace(old, new))


def test_a_figure_without_a_result_is_found() -> None:
    assert problems(README + "\nIt is 7.3x as fast.\n") == ["no result behind: 7.3x"]


def test_it_is_short() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    words = " ".join(line for line in prose.splitlines() if not line.startswith("|")).split()
    assert len(words) <= 900
