"""The figures of the README are those of the committed results.

One that is changed is found.
"""

import pytest

from analysis.pretrained.table import RESULTS
from analysis.quoted import ROOT, all_words, problems, read, words
from analysis.routes.tiny_lm import markdown, summarise

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_figure_is_in_the_results() -> None:
    assert problems(README) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("0.66%", "0.49%"),
        ("1.273 | 0.251", "1.263 | 0.251"),
        ("0.809 | 0.691", "0.809 | 0.681"),
        ("1.11%", "2.11%"),
    ],
)
def test_a_figure_that_was_changed_is_found(old: str, new: str) -> None:
    assert old in README
    assert problems(README.replace(old, new))


def test_make_fit_prints_the_static_rivals_of_the_committed_results() -> None:
    table = summarise(read("tiny_lm")).set_index("contender")
    told = (ROOT / "Makefile").read_text(encoding="utf-8")
    rows = {
        "local": "local",
        "a hybrid": "static: gated, local, gated, full",
        "routed": "ours",
    }
    for word, name in rows.items():
        row = table.loc[name]
        assert row["n"] == 5
        assert f"{word} {row['nll_hard']:.3f} at {row['cost_flops']:.3f}" in told


def test_a_figure_without_a_result_is_found() -> None:
    assert problems(README + "\nIt is 7.3x as fast.\n") == ["no result behind: 7.3x"]


def test_it_is_short() -> None:
    assert words(README) <= 800 and all_words(README) <= 1230


@pytest.mark.parametrize(
    "name",
    [
        "tiny_lm",
        "tiny_lm_cpu",
        "recipe",
        "long",
        "heads",
        "quoting",
        "learning_rate",
        "learning_rate_cpu",
    ],
)
def test_the_tables_beside_the_results_are_theirs(name: str) -> None:
    table = (RESULTS.parent / f"{name}.md").read_text(encoding="utf-8")
    assert table.strip() == markdown(summarise(read(name))).strip()
