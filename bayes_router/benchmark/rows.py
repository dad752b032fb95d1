"""Rows that a run which is cut off does not lose."""

from pathlib import Path
from typing import Any

import pandas as pd

from bayes_router.files import write_whole


class Rows:
    """Rows of a table, with the same `facts` in each: in NAME.partial.csv as they come, in NAME.csv once all are there.

    Args:
        path: NAME.csv, its folder made if need be; None to write nothing.
        facts: columns of every row.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]):
        self.path, self.facts, self.rows = path, facts, list[dict[str, Any]]()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        """One more."""
        self.rows.append({**row, **self.facts})
        if self.path is not None:
            write_whole(self.path.with_suffix(".partial.csv"), self._write)

    def finish(self) -> pd.DataFrame:
        """The whole table, under its own name now."""
        if self.path is not None and self.rows:
            self.path.with_suffix(".partial.csv").replace(self.path)
        return pd.DataFrame(self.rows)

    def _write(self, path: Path) -> None:
        pd.DataFrame(self.rows).to_csv(path, index=False, float_format="%.4g")
