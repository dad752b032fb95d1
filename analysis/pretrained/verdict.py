"""Prints what the page of pretrained models says first: each text's table, and where ours is not
below a rival.

    python -m analysis.pretrained.verdict [RESULTS.csv]

A contender lies below another in a cell (a text, length and budget at one executed cost) where the
paired difference is more than two standard errors. Pieces and seeds are both drawn: the variance of
the difference is that over pieces, each averaged over seeds, and that over seeds, each averaged
over pieces, added up; which counts what is left to chance in both twice, and so claims less.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.pretrained.table import CELL, OURS, RESULTS, lines, load, losses, standard_error

SHARE = RESULTS.with_name("pretrained_share.csv")
AT_ONE = f"{OURS}, fitted at one budget"
NAMES = {"novels": "novels", "wikitext": "WikiText-103", "python": "Python source"}
ORDER = (
    OURS,
    AT_ONE,
    "token x KV head",
    "token x layer",
    "static, query heads",
    "static, KV heads",
    "static, layers",
    "DuoAttention's objective",
    "one window of equal cost",
)


def apart(frame: pd.DataFrame, rival: str, window: int) -> pd.DataFrame:
    """How far ours lies below a rival of the same window in each cell, points and standard error.

    Paired by piece, and by seed where both have two or more; else the seeds of ours are what is
    drawn.
    """
    rows = []
    chosen = frame[frame["lost"].notna() & (frame["window"] == window)]
    for key, cell in chosen.groupby(CELL):
        ours, theirs = (
            cell[cell["contender"] == name].pivot_table("lost", index="piece", columns="seed")
            for name in (OURS, rival)
        )
        pieces = (theirs.mean(axis=1) - ours.mean(axis=1)).dropna()
        if len(pieces) < 2:
            continue
        paired = (theirs - ours).dropna(axis=1, how="all").mean()
        seeds = paired if len(paired) > 1 else ours.loc[pieces.index].mean()
        error = standard_error(seeds) if len(seeds) > 1 else 0.0
        row = dict(zip(CELL, key, strict=True)) | {"rival": rival, "window": window}
        row |= {"below": 100 * pieces.mean(), "se": 100 * np.hypot(standard_error(pieces), error)}
        rows.append(row | {"seeds": f"{ours.shape[1]} against {theirs.shape[1]}"})
    return pd.DataFrame(rows)


def every(frame: pd.DataFrame) -> pd.DataFrame:
    """`apart` of all rivals and windows."""
    rivals = [name for name in ORDER[1:] if name in set(frame["contender"])]
    windows = sorted(frame["window"].unique(), reverse=True)
    parts = [apart(frame, rival, window) for window in windows for rival in rivals]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def verdicts(cells: pd.DataFrame) -> pd.DataFrame:
    """A row a window and rival: cells below by two standard errors, level, above; and which."""
    rows = []
    for (window, rival), part in cells.groupby(["window", "rival"], sort=False):
        below, above = part["below"] > 2 * part["se"], part["below"] < -2 * part["se"]
        rest = part[~below]
        named = "; ".join(
            f"{r.text} {r.context} at {r.budget}: {r.below:.2f} +- {r.se:.2f}"
            for r in rest.itertuples()
        )
        row = {"window": window, "rival": rival, "seeds": part["seeds"].iloc[0]}
        row |= {"cells": len(part), "below": below.sum(), "level": (~below & ~above).sum()}
        rows.append(row | {"above": above.sum(), "not below": named})
    return pd.DataFrame(rows)


def shown(frame: pd.DataFrame) -> Iterator[str]:
    """A table a window, length and text: a row a contender, a column a budget."""
    table = losses(frame)
    for (window, context), part in table.groupby(["window", "context"], sort=False):
        budgets = sorted(part["budget"].unique(), reverse=True)
        for text in sorted(part["text"].unique(), key=[*NAMES, "speeches"].index):
            yield f"\n| {NAMES.get(text, text)}, {context} tokens, window {window} | seeds | " + (
                " | ".join(map(str, budgets)) + " |"
            )
            yield "|" + "---|" * (2 + len(budgets))
            here = part[part["text"] == text].set_index(["contender", "budget"])
            for name in (one for one in ORDER if one in here.index.levels[0]):
                if name not in here.index.get_level_values(0):
                    continue
                bold = "**" if name == OURS else ""
                rows = [here.loc[(name, b)] if (name, b) in here.index else None for b in budgets]
                found = [
                    "" if r is None else f"{bold}{r['lost']:.2f} +- {r['se']:.2f}{bold}"
                    for r in rows
                ]
                seeds = max(int(r["seeds"]) for r in rows if r is not None)
                yield f"| {bold}{name}{bold} | {seeds} | " + " | ".join(found) + " |"


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=SHARE)
    frame = load(parser.parse_args().results)
    print("Perplexity lost in percent, SE over pieces")
    print("\n".join(shown(frame.sort_values(["window", "context"], ascending=False))))
    cells = every(frame)
    print("\n### How far token x query head lies below, points of perplexity\n")
    print("\n".join(lines(cells.round({"below": 2, "se": 2}))))
    print("\n### By rival\n")
    print("\n".join(lines(verdicts(cells))))


if __name__ == "__main__":
    sys.exit(main())
