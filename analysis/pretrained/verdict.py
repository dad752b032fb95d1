"""Prints what the page of pretrained models says first: what each contender loses, and where ours
is not below a rival.

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
NAMES = {
    "novels": "novels",
    "wikitext": "WikiText-103",
    "python": "Python source",
    "speeches": "speeches",
}
ORDER = (
    OURS,
    AT_ONE,
    "token x key head",
    "token x layer",
    "static, query heads",
    "static, key heads",
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
    both = [chosen[chosen["contender"] == name].groupby(CELL) for name in (OURS, rival)]
    for key in sorted(set(both[0].groups) & set(both[1].groups)):
        ours, theirs = (
            one.get_group(key).set_index(["piece", "seed"])["lost"].unstack() for one in both
        )
        pieces = (theirs.mean(axis=1) - ours.mean(axis=1)).dropna()
        if len(pieces) < 2:
            continue
        paired = (theirs - ours).dropna(axis=1, how="all").mean()
        seeds = paired if len(paired) > 1 else ours.loc[pieces.index].mean()
        error = standard_error(seeds) if len(seeds) > 1 else 0.0
        row = dict(zip(CELL, key, strict=True)) | {"rival": rival, "window": window}
        row |= {"below": 100 * pieces.mean(), "se": 100 * np.hypot(standard_error(pieces), error)}
        row |= {"cost": both[1].get_group(key)["cost"].mean()}
        rows.append(row | {"seeds": f"{ours.shape[1]} against {theirs.shape[1]}"})
    return pd.DataFrame(rows)


def every(frame: pd.DataFrame) -> pd.DataFrame:
    """`apart` of all rivals and windows."""
    rivals = [name for name in ORDER[2:] if name in set(frame["contender"])]
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
    """A table a window and length: a row a budget and contender, a column a text."""
    table = losses(frame).sort_values(["window", "context"], ascending=False)
    for (window, context), part in table.groupby(["window", "context"], sort=False):
        here = part.set_index(["budget", "contender", "text"])
        yield f"\n| {context} tokens, window {window} | seeds | {' | '.join(NAMES.values())} |"
        yield "|" + "---|" * (2 + len(NAMES))
        for budget in sorted(part["budget"].unique()):
            read = part[part["budget"] == budget]
            for name in (one for one in ORDER if one in set(read["contender"])):
                bold, cells = "**" if name == OURS else "", list[str]()
                for text in NAMES:
                    key = (budget, name, text)
                    if key in here.index:
                        row = here.loc[key]
                        cells.append(f"{bold}{row['lost']:.2f} +- {row['se']:.2f}{bold}")
                    else:
                        cells.append("")
                seeds = read[read["contender"] == name]["seeds"].max()
                yield f"| {bold}{budget}, {name}{bold} | {seeds} | {' | '.join(cells)} |"


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=SHARE)
    frame = load(parser.parse_args().results)
    print("Perplexity lost in percent, SE over pieces")
    print("\n".join(shown(frame)))
    cells = every(frame)
    print("\n### How far token x query head lies below, points of perplexity\n")
    print("\n".join(lines(cells.round({"below": 2, "se": 2, "cost": 3}))))
    print("\n### By rival\n")
    print("\n".join(lines(verdicts(cells))))
    at_one = [apart(frame, AT_ONE, window) for window in frame["window"].unique()]
    print("\n### The same of fits made at one budget and length, by one that serves a range\n")
    print("\n".join(lines(pd.concat(at_one).round({"below": 2, "se": 2, "cost": 3}))))


if __name__ == "__main__":
    sys.exit(main())
