"""What a prototype of the fit did otherwise, one difference against another.

    python -m analysis.pretrained.bisect [BISECT.csv]

Eight fits of one seed in an orthogonal array: six differences between the library's fit and a
prototype's, each at the library's level in four fits and at the prototype's in the other four. An
effect is the mean of the latter less the mean of the former, in points of perplexity lost; the
array's seventh contrast belongs to no difference and shows what is noise. All were fitted and read
by the prototype, which is not part of this repository; the last rows are a patch that the library
fitted, read by the prototype on the same pieces. Neither level of `input` is the library's, which
reads the layer's input at unit RMS and at a rate of 0.01.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from analysis.pretrained.table import lines

RESULTS = Path(__file__).parents[1] / "results" / "pretrained_bisect.csv"
DIFFERENCES = ["draws", "input", "slope", "lengths", "price", "rates"]
CELL = ["text", "budget"]


def effects(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a cell: the effect of each difference, and of the contrast that is none's."""
    fits = frame[frame["draws"].notna()]
    order = fits.groupby("fit", sort=False)[DIFFERENCES].first()
    # the first fit has the library's level of everything
    moved = order.ne(order.iloc[0]).astype(int)
    moved["none"] = (moved["draws"] + moved["lengths"] + moved["input"]) % 2
    balanced = (moved.sum() == len(moved) / 2).all()
    if not balanced:
        raise ValueError(f"fits: expected each level in half of them; got {moved.sum().to_dict()}")
    rows = []
    for cell, part in fits.groupby(CELL, sort=False):
        lost = part.set_index("fit")["lost"]
        row = dict(zip(CELL, cell, strict=True))
        for name, level in moved.items():
            there = lost[level[level == 1].index].mean()
            row[str(name)] = there - lost[level[level == 0].index].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Print the fits and the effects."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    frame = pd.read_csv(parser.parse_args().results)
    shown = frame.assign(
        cell=[
            f"{lost:.2f} +- {se:.2f} at {cost:.3f}"
            for lost, se, cost in zip(frame["lost"], frame["se"], frame["cost"], strict=True)
        ]
    )
    wide = shown.pivot(index="fit", columns=["budget", "text"], values="cell").fillna("")
    wide.columns = [f"{text} {budget:g}" for budget, text in wide.columns]
    settings = frame.groupby("fit")[DIFFERENCES].first().fillna("")
    print("\n".join(lines(settings.reset_index())))
    print("\nPerplexity lost, %, at the executed cost (12 pieces)\n")
    print("\n".join(lines(wide.reset_index())))
    print("\nEffects of the prototype's levels, points of perplexity\n")
    print("\n".join(lines(effects(frame).round(2))))


if __name__ == "__main__":
    sys.exit(main())
