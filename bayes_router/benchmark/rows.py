"""Rows of a table that a run which is cut off does not lose."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bayes_router.files import write_whole


class Rows:
    """Rows of a table, each written as soon as it is known.

    Args:
        path: NAME.csv, its folder made if need be; None to write nothing.
        facts: columns of every row, after its own.
        digits: significant ones of a number; None for all.
        resume: the rows that stand in `path` already are kept, and new ones added to them.
            Otherwise rows stand in NAME.partial.csv until `finish`, so that an older table is
            replaced by a whole one alone.
        words: columns that are text, even if every letter is a digit.
    """

    def __init__(
        self,
        path: Path | None,
        facts: Mapping[str, Any] | None = None,
        *,
        digits: int | None = 4,
        resume: bool = False,
        words: Sequence[str] = (),
    ):
        self.path, self.facts = path, dict(facts or {})
        self._format = None if digits is None else f"%.{digits}g"
        self._now = path if path is None or resume else path.with_suffix(".partial.csv")
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            known = pd.read_csv(path, dtype=dict.fromkeys(words, str)).to_dict("records")
            self.rows = [{str(key): value for key, value in row.items()} for row in known]

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, and write it."""
        self.rows.append({**row, **self.facts})
        if self._now is not None:
            write_whole(
                self._now,
                lambda path: self.frame().to_csv(path, index=False, float_format=self._format),
            )

    def frame(self) -> pd.DataFrame:
        """All rows so far."""
        return pd.DataFrame(self.rows)

    def finish(self) -> pd.DataFrame:
        """The whole table, under its own name now."""
        if self.path is not None and self._now is not None and self._now != self.path and self.rows:
            self._now.replace(self.path)
        return self.frame()
