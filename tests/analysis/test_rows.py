"""Rows of a study: none is lost, and a resumed one goes on.

A table that stands is replaced by a whole one alone.
"""

from pathlib import Path

import pandas as pd

from bayes_router.benchmark.rows import Rows


def test_an_older_table_stands_until_all_rows_are_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    path.parent.mkdir()
    path.write_text("old\n1\n")
    rows = Rows(path, {"device": "cpu"})
    rows.add({"ms": 1.23456})
    assert (
        path.read_text() == "old\n1\n" and "1.235" in path.with_suffix(".partial.csv").read_text()
    )
    rows.add({"ms": 2.0})
    assert rows.finish()["device"].tolist() == ["cpu", "cpu"] and pd.read_csv(path)[
        "ms"
    ].tolist() == [1.235, 2.0]
    assert not path.with_suffix(".partial.csv").exists()


def test_a_resumed_table_keeps_its_rows_to_every_digit_and_its_words(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    first = Rows(path, digits=None, resume=True, words=("commit",))
    first.add({"commit": "0012345", "nll": 0.1 + 0.2})
    second = Rows(path, digits=None, resume=True, words=("commit",))
    assert second.rows == [{"commit": "0012345", "nll": 0.1 + 0.2}]
    second.add({"commit": "abc", "nll": 1.0})
    assert pd.read_csv(path, dtype={"commit": str})["commit"].tolist() == ["0012345", "abc"]
    assert len(Rows(None).finish()) == 0
