"""Prints the tables of the study of pretrained models from its rows.

    python -m analysis.pretrained.table [RESULTS.csv]

`lost` is perplexity lost against the unpatched model, exp(mean of the paired differences in nats) -
1. Standard errors are over the pieces of a text, each piece averaged over seeds first, for every
contender reads the same pieces; `below` is how far the first contender lies below a rival, in
points of perplexity, with the standard error of that paired difference.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).parents[1] / "results" / "pretrained.csv"
OURS = "token x query head"
CELL = ["text", "context", "budget"]


def load(path: Path) -> pd.DataFrame:
    """Rows of one file, or of all files of a folder."""
    paths = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    return pd.concat([pd.read_csv(p) for p in paths], ignore_index=True)


def losses(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a contender, window and cell.

    Lost, its standard error, the executed cost, seeds and pieces.
    """
    rows = []
    for key, cell in frame[frame["lost"].notna()].groupby(["contender", "window", *CELL]):
        pieces = cell.groupby("piece")["lost"].mean()
        row = dict(zip(["contender", "window", *CELL], key, strict=True))
        row |= {
            "lost": percent(pieces.mean()),
            "se": 100 * standard_error(pieces),
            "cost": cell["cost"].mean(),
        }
        by_seed = cell.groupby("seed")["lost"].mean()
        row |= {
            "seeds": len(by_seed),
            "between": 100 * by_seed.std() if len(by_seed) > 1 else np.nan,
        }
        rows.append(row | {"pieces": len(pieces)})
    return pd.DataFrame(rows)


def far(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a contender, window and cell: KL(unpatched || routed) in hundredths of a nat per token.

    The mean over pieces and its standard error, as in `losses`; no rows where it was not read.
    """
    if "kl" not in frame:
        return pd.DataFrame()
    named = frame.drop(columns="lost").rename(columns={"kl": "lost"})
    return (
        losses(named)
        .assign(lost=lambda t: 100 * np.log1p(t["lost"] / 100))
        .rename(columns={"lost": "kl"})
    )


def percent(nats: float) -> float:
    """Perplexity lost, %."""
    return float(100 * np.expm1(nats))


def standard_error(values: pd.Series) -> float:
    """Of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def below(frame: pd.DataFrame, rival: str, window: int) -> pd.DataFrame:
    """How far the first contender lies below a rival of the same window in each cell.

    Paired by piece; points and standard error.
    """
    rows = []
    chosen = frame[frame["lost"].notna() & (frame["window"] == window)]
    for key, cell in chosen.groupby(CELL):
        ours, theirs = (
            cell[cell["contender"] == name].groupby("piece")["lost"].mean()
            for name in (OURS, rival)
        )
        paired = (theirs - ours).dropna()
        if len(paired) > 1:
            row = dict(zip(CELL, key, strict=True)) | {"rival": rival, "window": window}
            rows.append(
                row
                | {
                    "below": 100 * paired.mean(),
                    "se": 100 * standard_error(paired),
                    "pieces": len(paired),
                }
            )
    return pd.DataFrame(rows)


KINDS = ("novels", "python", "speeches", "wikitext")


def at_one_dial(frame: pd.DataFrame) -> pd.DataFrame:
    """What each kind of text costs at one dial, where all four were read.

    The dial is where the fit had the budget; the mean over kinds, each kind's, and by how much the
    farthest of them departs from that mean: how far a budget that is set on all kinds together is
    missed on one. Means over seeds, and the largest departure of any.
    """
    rows = []
    asked = frame[frame["at_fit"].notna() & frame["text"].isin(KINDS)]
    for key, cell in asked.groupby(["contender", "window", "context", "budget"]):
        each = cell.groupby(["seed", "text"])["at_fit"].first().unstack()
        each = each.reindex(columns=list(KINDS)).dropna()
        if len(each):
            apart = each.sub(each.mean(axis=1), axis=0).abs().to_numpy().max()
            row = dict(zip(["contender", "window", "context", "budget"], key, strict=True))
            row |= {"seeds": len(each), "mean": each.to_numpy().mean()}
            rows.append(row | each.mean().to_dict() | {"farthest": apart})
    return pd.DataFrame(rows)


ASKED = ["window", "text", "context", "budget"]
"""A cell of retrieval."""


def retrieved(frame: pd.DataFrame) -> pd.DataFrame:
    """Answers by task, length and budget; 1 is the unpatched model.

    Prompts, those answered whole (a mean over seeds), the share of right items, nats per token of
    the answer, how many more that is than unpatched, paired by prompt, each prompt averaged over
    seeds first, and its standard error; the executed cost of the prompts, where it was read.
    """
    asked, rows = frame[frame["right"].notna()], []
    unpatched = dict(list(asked[asked["budget"] == 1].groupby(ASKED[:3])))
    for key, cell in asked.groupby(["contender", *ASKED]):
        row = dict(zip(["contender", *ASKED], key, strict=True))
        more = (_by_prompt(cell) - _by_prompt(unpatched[key[1:4]])).dropna()
        seeds = cell["seed"].nunique()
        row |= {"seeds": seeds, "prompts": cell["piece"].nunique()}
        row |= {"whole": (cell["right"] >= 1).sum() / seeds, "right": cell["right"].mean()}
        row |= {"nats": cell["nats"].mean(), "more": more.mean(), "se": standard_error(more)}
        rows.append(row | ({"cost": cell["cost"].mean()} if "cost" in cell else {}))
    return pd.DataFrame(rows)


def _by_prompt(cell: pd.DataFrame) -> pd.Series:
    """Nats, each prompt averaged over seeds."""
    return cell.groupby("piece")["nats"].mean()


def outdone(frame: pd.DataFrame) -> pd.DataFrame:
    """How many nats per token of the answer rivals lose beyond ours, by either likelihood.

    Paired by prompt, each prompt averaged over seeds first; `whole` of either is as in `retrieved`.
    """
    asked, rows = frame[frame["right"].notna() & (frame["budget"] < 1)], []
    for key, cell in asked.groupby(ASKED):
        groups = {name: part for name, part in cell.groupby("contender")}
        whole = {
            name: (part["right"] >= 1).sum() / part["seed"].nunique()
            for name, part in groups.items()
        }
        for ours in (name for name in groups if name.startswith(OURS)):
            for rival in (name for name in groups if not name.startswith(OURS)):
                apart = (_by_prompt(groups[rival]) - _by_prompt(groups[ours])).dropna()
                row = dict(zip(ASKED, key, strict=True)) | {"ours": ours, "rival": rival}
                row |= {"prompts": len(apart), "whole": whole[ours], "the rival's": whole[rival]}
                rows.append(row | {"beyond": apart.mean(), "se": standard_error(apart)})
    return pd.DataFrame(rows)


def lines(table: pd.DataFrame) -> Iterator[str]:
    """Markdown."""
    yield "| " + " | ".join(map(str, table.columns)) + " |"
    yield "|" + "---|" * len(table.columns)
    for row in table.itertuples(index=False):
        yield "| " + " | ".join("" if value != value else str(value) for value in row) + " |"


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """One line a contender and window, one column a budget: lost +- SE."""
    shown = table.copy()
    shown["cell"] = [f"{a:.2f} +- {b:.2f}" for a, b in zip(table["lost"], table["se"], strict=True)]
    wide = shown.pivot_table(
        index=["window", "contender", "seeds"], columns="budget", values="cell", aggfunc="first"
    )
    return wide.reindex(columns=sorted(wide.columns, reverse=True)).fillna("").reset_index()


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    frame = load(parser.parse_args().results)
    if "piece" not in frame:  # of means alone
        print("\n".join(lines(frame)))
        return
    read = "lost" in frame  # beside retrieval, or retrieval alone
    frame = frame if read else frame.assign(lost=np.nan)
    table = losses(frame)
    for (context, text), part in table.groupby(["context", "text"]) if read else ():
        n = f"{int(part['pieces'].min())} to {int(part['pieces'].max())} pieces"
        print(f"\n### {text}, {context} tokens: perplexity lost, % ({n})\n")
        print("\n".join(lines(spread(part))))
    rivals = [name for name in frame["contender"].unique() if name != OURS]
    apart = [below(frame, rival, window) for rival in rivals for window in frame["window"].unique()]
    apart = [part for part in apart if len(part)]
    if apart:
        print(
            "\n### How far token x query head lies below its rivals, points of perplexity "
            "(paired by piece)\n"
        )
        print("\n".join(lines(pd.concat(apart).round(3))))
    for (context, text), part in far(frame).groupby(["context", "text"]) if "kl" in frame else ():
        print(f"\n### {text}, {context} tokens: KL from the unpatched model, 0.01 nats\n")
        print("\n".join(lines(spread(part.rename(columns={"kl": "lost"})))))
    kinds = at_one_dial(frame) if "at_fit" in frame else pd.DataFrame()
    if len(kinds):
        print("\n### What four kinds of text cost at one dial, and the farthest from their mean\n")
        print("\n".join(lines(kinds.round(3))))
    if "right" not in frame:
        return
    print(
        "\n### Retrieval: prompts answered whole, share of items right, nats per token of the "
        "answer and how many more than unpatched (budget 1)\n"
    )
    print("\n".join(lines(retrieved(frame).round(3))))
    if len(further := outdone(frame)):
        print("\n### How many nats rivals lose beyond ours, paired by prompt\n")
        print("\n".join(lines(further.round(3))))


if __name__ == "__main__":
    sys.exit(main())
