"""Perplexity lost against attention cost, of `analysis.pretrained.smollm`.

`python -m analysis.pretrained.figure [RESULTS.csv]`.
"""

import argparse
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from bayes_router.diagnostics.figures.run import PALETTE

RESULTS = Path(__file__).parents[1] / "results" / "patch_smollm.csv"
MARKERS = {
    "routed": "o",
    "static, greedy": "s",
    "static, one by one": "v",
    "static, the router's own": "P",
    "static, every n-th": "X",
    "one window": "D",
    "the window alone": "*",
}


def lost(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with `lost`.

    Perplexity over the original's on the same text and context, minus 1, in percent.
    """
    base = frame[frame["contender"] == "original"].set_index(["text", "context"])["perplexity"]
    keys = pd.MultiIndex.from_frame(frame[["text", "context"]])
    return frame.assign(
        lost=100 * (frame["perplexity"].to_numpy() / base.reindex(keys).to_numpy() - 1)
    )


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel a length and text, a marker a contender, a line through the budgets of each."""
    texts, lengths = list(dict.fromkeys(frame["text"])), list(dict.fromkeys(frame["context"]))
    with sns.axes_style("ticks"), sns.plotting_context("notebook"):
        size = (6.5 * len(texts), 5 * len(lengths))
        figure, axes = plt.subplots(
            len(lengths), len(texts), figsize=size, squeeze=False, layout="constrained"
        )
        for ax, (length, text) in zip(axes.flat, product(lengths, texts), strict=True):
            shown = frame[(frame["text"] == text) & (frame["context"] == length)]
            for place, (name, marker) in enumerate(MARKERS.items()):
                part = shown[shown["contender"] == name].sort_values("cost")
                colour = PALETTE[place] if place < len(PALETTE) else "0.5"
                width = 2.0 if name == "routed" else 0.8
                ax.plot(
                    part["cost"], part["lost"], marker=marker, color=colour, lw=width, label=name
                )
            ax.axhline(1.0, color="0.6", lw=0.8, ls="--")
            ax.set(
                title=f"{text}, {length} tokens",
                xlabel="attention cost executed (full = 1)",
                ylabel="perplexity lost (%)",
            )
        axes[0][-1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        sns.despine(figure)
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)


def main() -> None:
    """Draw beside the table, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    args = parser.parse_args()
    frame = lost(pd.read_csv(args.results))
    # a run that was cut off has more originals
    routed = set(frame.loc[frame["contender"] == "routed", "context"])
    frame = frame[frame["context"].isin(routed)].sort_values(
        "context", ascending=False, kind="stable"
    )
    draw(frame, args.results.with_suffix(".png"))
    columns = ["context", "text", "budget", "contender", "cost", "perplexity", "lost"]
    shown = frame[columns].sort_values(
        columns[:3] + ["perplexity"], ascending=[False, True, False, True]
    )
    print(shown.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
