"""The figures of docs/ and of the studies stand in the committed tables that they are printed from.

One that stands in none is found, unless it is known to.
"""

from pathlib import Path

import numpy as np
import pytest

from analysis import bound
from analysis.bound import PAGES, ROOT, blind, is_among, known, parts, sources, unbound


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_figure_is_in_a_result_or_known_to_be_in_none(page: Path) -> None:
    assert [str(one) for one in unbound(page) if (one.page, one.figure) not in known()] == []


def test_those_known_to_be_in_none_are_few_and_say_why() -> None:
    lines = (ROOT / "analysis" / "unbound.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(lines) <= 35 and all(len(line.split()) > 2 for line in lines)


def test_a_new_figure_without_a_result_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\nIt is 7.31x as fast, at a budget of 0.5.\n\n"
        "By `python -m analysis.routes.dial` 1.353 at 0.25, not 1.457.\n\n"
        "| budget | loss | aim | ms, by hand |\n|---|---|---|---|\n"
        "| 0.25 | 1.353 | 1.111 | 3.31 |\n| 0.5 | 1.222 | 1 | 3.32 |\n\n"
        "Read by hand, 3.33 ms.\n",
        encoding="utf-8",
    )
    assert [one.figure for one in unbound(page)] == ["7.31x", "1.457", "1.222"]


def test_units_and_what_stands_around() -> None:
    pool = np.array([0.0982, 0.067, 5_310_000.0, -0.4])
    assert is_among("9.8%", pool) and not is_among("9.9%", pool) and not is_among("9.8", pool)
    assert is_among("6.7", pool, "| 9.8% (") and not is_among("6.7", pool, "9.8% (1 to 2), ")
    assert is_among("5.3", pool, "", " million") and not is_among("5.3", pool)
    assert is_among("0.4", pool, "it lies below by ") and not is_among("0.4", pool)
    assert is_among("0.07", pool) and not is_among("0.06", pool)


def test_a_paragraph_has_its_own_tables_or_those_named_before() -> None:
    assert sources("`python -m analysis.speed.growth`, results/recall.csv") == ["recall", "growth"]
    assert sources("`... patch_guard.csv`") == ["patch_guard"] and sources("nothing.csv") == []
    assert len(parts("one\n\n- two\n- three\n\n| a |\n|---|\n| 1 |")) == 4


def page_of(folder: Path, text: str) -> Path:
    """A page with one section."""
    page = folder / "page.md"
    page.write_text(f"# A page\n\n{text}\n", encoding="utf-8")
    return page


def test_a_value_of_another_row_column_or_table_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "ROOT", tmp_path)
    head = "`python -m analysis.pretrained.table analysis/results/pretrained_decay.csv`:\n\n"
    head += "| % of perplexity lost | novels .4 | .3 | WikiText .4 |\n|---|---|---|---|\n"
    head += "| token x query head |"
    right = "0.42 +- 0.06 | 0.40 +- 0.07 | 0.45 +- 0.05"
    assert unbound(page_of(tmp_path, f"{head} {right} |")) == []
    others = {  # each a value of the same file
        "0.45 +- 0.05 | 0.40 +- 0.07 | 0.45 +- 0.05": ["0.45", "0.05"],  # another text's
        "0.40 +- 0.06 | 0.40 +- 0.07 | 0.45 +- 0.05": ["0.40", "0.06"],  # another budget's
        "0.42 +- 0.07 | 0.40 +- 0.07 | 0.45 +- 0.05": ["0.07"],  # another row's error
    }
    for wrong, missed in others.items():
        found = unbound(page_of(tmp_path, f"{head} {wrong} |"))
        assert [one.figure for one in found] == missed, wrong


def test_in_prose_the_words_of_a_clause_name_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "ROOT", tmp_path)
    by = "(`python -m analysis.posterior smollm2-135m-teacher --model M`, `patch_risk.csv`)"
    right = f"The rank correlation is .681 (.667 to .694) on own text, .604 on speeches {by}."
    assert unbound(page_of(tmp_path, right)) == []
    swapped = right.replace(".604", ".677")  # German's
    assert [one.figure for one in unbound(page_of(tmp_path, swapped))] == [".677"]
    interval = right.replace(".667", ".658")  # of novels by others
    assert [one.figure for one in unbound(page_of(tmp_path, interval))] == [".658"]


def test_few_changed_digits_would_pass() -> None:
    passed, tried = blind([ROOT / "docs" / "uncertainty.md"])
    assert passed < 0.1 * tried and tried > 4000
