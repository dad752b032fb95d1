"""The aims of the study of pretrained models beside what was read: the table of docs/aims.md.

    python -m analysis.pretrained.aims              the aims
    python -m analysis.pretrained.aims --retrieval  each task, length, budget and window

Figures and verdicts are computed from the committed rows. An aim of a loss is met by two standard
errors, met in the mean alone, or missed by so much.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from analysis.pretrained import freezing, holding, verdict
from analysis.pretrained.retrieval import TASKS
from analysis.pretrained.table import OURS, RESULTS, lines, losses, retrieved

ALL, WITHIN = 24, 1
"""Prompts, and how many of them may be lost."""
SHORTEST = 4096
"""Tokens from which on that is an aim."""
APART, SINGLE = 0.02, 0.1
"""How far a cost may be from the budget, and a patch for all from one fitted there, points."""
TEXTS = {"novels": "novels", "wikitext": "WikiText", "python": "Python", "speeches": "speeches"}
FROZEN, ITS_AIM = 0.4, 0.05
"""Share of the cache to free, and the points that may be lost for it."""
Told = dict[str, str]


class Aim(NamedTuple):
    """At most so many percent of perplexity lost on each text."""

    budget: float
    window: int
    context: int
    most: dict[str, float]


AIMS = (
    Aim(0.4, 1024, 8192, {"novels": 0.1, "wikitext": 0.1}),
    Aim(0.3, 1024, 8192, {"novels": 0.2, "wikitext": 0.25, "python": 0.7}),
    Aim(0.2, 512, 8192, {"novels": 0.9, "wikitext": 0.9}),
    Aim(0.15, 256, 8192, {"novels": 1.8, "wikitext": 1.8}),
    Aim(0.3, 256, 2048, {"novels": 0.8}),
    Aim(0.3, 512, 4096, {"novels": 0.4}),
)


def read(name: str) -> pd.DataFrame:
    """Rows of a study."""
    return pd.read_csv(RESULTS.with_name(f"pretrained_{name}.csv"))


def judged(reached: float, error: float, most: float, digits: int = 2) -> str:
    """In words; all in percent."""
    if reached + 2 * error <= most:
        return "**met**, by two standard errors"
    if reached <= most:
        return "**met** in the mean alone"
    return f"**missed** by {reached - most:.{digits}f}"


def number(count: float, what: str) -> str:
    """`3 seeds`."""
    return f"{count:.0f} {what}" + ("" if count == 1 else "s")


def span(seeds: pd.Series) -> str:
    """`1 to 3 seeds`."""
    few = f"{seeds.min()} to " if seeds.min() < seeds.max() else ""
    return few + number(seeds.max(), "seed")


def perplexity(share: pd.DataFrame) -> Iterator[Told]:
    """A row an aim; the verdict is that of the text that is nearest to missing it."""
    cells = losses(share[share["contender"] == OURS])
    cells = cells.set_index(["budget", "window", "context", "text"])
    for aim in AIMS:
        rows = {text: cells.loc[(aim.budget, aim.window, aim.context, text)] for text in aim.most}
        found = [judged(r["lost"], r["se"], aim.most[t]) for t, r in rows.items()]
        one = next(iter(rows.values()))
        where = f"{aim.context} tokens, budget {aim.budget:g}, window {aim.window}: "
        yield {
            "what": where + "; ".join(TEXTS[text] for text in rows),
            "aim": "at most " + "; ".join(f"{most:.2f}" for most in aim.most.values()),
            "read": "; ".join(f"{r['lost']:.2f} +- {r['se']:.2f}" for r in rows.values()),
            "n": f"{number(one['seeds'], 'seed')}, {one['pieces']:.0f} pieces",
            "met": found[0] if len(set(found)) == 1 else "; ".join(found),
        }


def rivals(frame: pd.DataFrame, model: str = "") -> Iterator[Told]:
    """A row a rival: the cells where ours lies below by two standard errors, of all windows."""
    for rival, part in verdict.every(frame).groupby("rival", sort=False):
        below, above = part["below"] > 2 * part["se"], part["below"] < -2 * part["se"]
        rest = "; ".join(
            f"{cell(r)}: {r.below:.2f} +- {r.se:.2f}" for r in part[~below].itertuples()
        )
        level = "above it in none" if not above.any() else f"above it in {above.sum()}"
        yield {
            "what": f"{model}below {rival}",
            "aim": "every budget and text, by two standard errors of pieces and seeds",
            "read": f"in {below.sum()} of {number(len(part), 'cell')}"
            + (f"; not {rest}" if rest else ""),
            "n": "seeds " + ", ".join(part["seeds"].unique()),
            "met": "**met**" if below.all() else f"**missed** in {(~below).sum()}, {level}",
        }


def cell(row: Any) -> str:
    """A text, budget, window and length."""
    length = "" if row.context == 8192 else f", {row.context} tokens"
    return f"{TEXTS[row.text]} at {row.budget:g}{length}, window {row.window}"


def single(share: pd.DataFrame) -> Iterator[Told]:
    """How much more one patch for every budget and length loses than a fit made at each."""
    if verdict.AT_ONE not in set(share["contender"]):
        return
    for window in sorted(share[share["contender"] == verdict.AT_ONE]["window"].unique()):
        apart = verdict.apart(share, verdict.AT_ONE, window)
        beyond = apart[-apart["below"] > SINGLE]
        worst = apart.loc[apart["below"].idxmin()]
        yield {
            "what": f"one patch for every budget and length, window {window}",
            "aim": f"within {SINGLE} points of a fit made at each",
            "read": f"in {len(apart) - len(beyond)} of {number(len(apart), 'cell')}; "
            f"{-apart['below'].median():.2f} more in the median, at worst {-worst['below']:.2f} +- "
            f"{worst['se']:.2f} ({cell(worst)})",
            "n": "seeds " + ", ".join(apart["seeds"].unique()),
            "met": f"**missed** in {len(beyond)}" if len(beyond) else "**met**",
        }


def found(asked: pd.DataFrame, contender: str = OURS) -> pd.DataFrame:
    """A row a task, length, budget and window: prompts answered whole by seed."""
    table = retrieved(asked)
    rows = []
    for at in table[(table["contender"] == contender) & (table["budget"] < 1)].itertuples():
        here = asked[(asked["text"] == at.text) & (asked["context"] == at.context)]
        alone = here[here["budget"] == 1].drop_duplicates("piece")
        unpatched = int((alone["right"] >= 1).sum())
        mine = here[(here["contender"] == contender) & (here["window"] == at.window)]
        mine = mine[mine["budget"] == at.budget]
        whole = [int((part["right"] >= 1).sum()) for _, part in mine.groupby("seed")]
        row = {"task": at.text, "tokens": at.context, "budget": at.budget, "window": at.window}
        row |= {"unpatched": unpatched, "by seed": ", ".join(map(str, whole))}
        row |= {"fewer": unpatched - at.whole, "more nats": at.more, "SE": at.se}
        rows.append(row | {"cost": at.cost, "seeds": at.seeds})
    return pd.DataFrame(rows)


def wide(asked: pd.DataFrame) -> pd.DataFrame:
    """A row a length, budget, window and contender, a column a task.

    Prompts answered whole by seed, of those that the unpatched model answers, and how many more
    nats per token of the answer.
    """
    parts = []
    for name in dict.fromkeys([OURS, *sorted(asked["contender"].unique())]):
        rows = found(asked, name)
        shown = [
            f"{r['by seed']} of {r['unpatched']}; {r['more nats']:.2f} +- {r['SE']:.2f}"
            for r in rows.to_dict("records")
        ]
        parts.append(rows.assign(contender=name, shown=shown))
    keys = ["tokens", "budget", "window", "contender"]
    table = pd.concat(parts, ignore_index=True)
    table["order"] = table["contender"].ne(OURS)
    table = table.pivot_table("shown", [*keys, "order"], "task", "first").fillna("").reset_index()
    table = table.sort_values(
        ["tokens", "budget", "window", "order"], ascending=[False] * 3 + [True]
    )
    named = [task for task in TASKS if task in table]
    return table[[*keys, *named]].rename_axis(columns=None)


def retrieval(asked: pd.DataFrame) -> Iterator[Told]:
    """A row a task: the mean over seeds is at most one prompt of 24 below the unpatched model.

    Of each length and budget the largest window that it leaves room for counts; what a smaller one
    loses, or ours in a shorter text, is named beside it.
    """
    counted = found(asked)
    for task, cells in counted.groupby("task", sort=False):
        largest = cells.groupby(["tokens", "budget"])["window"].transform("max")
        counts = (cells["window"] == largest) & (cells["tokens"] >= SHORTEST)
        most = cells[counts].loc[cells[counts]["more nats"].idxmax()]
        alone = cells.groupby("tokens")["unpatched"].first()
        many = cells["fewer"] > WITHIN + 1e-9
        some = cells[counts]["unpatched"].max()
        met = "**met**" if some else "nothing to lose: the unpatched model answers none"
        yield {
            "what": f"{task}, {', '.join(map(str, alone.index))} tokens",
            "aim": f"budgets from 0.2 on, {SHORTEST} tokens and more: within {WITHIN} of {ALL} of "
            f"unpatched, {', '.join(map(str, alone))}",
            "read": f"{cells[counts]['fewer'].max():.1f} fewer at worst, the mean of seeds; nats a "
            f"token at most {most['more nats']:.3f} +- {most['SE']:.3f} more",
            "n": f"{span(cells[counts]['seeds'])}, {ALL} prompts, {number(counts.sum(), 'cell')}",
            "met": (f"**missed**: {fewer(cells[many & counts])}" if (many & counts).any() else met)
            + (f" (beside it {fewer(cells[many & ~counts])})" if (many & ~counts).any() else ""),
        }


def fewer(cells: pd.DataFrame) -> str:
    """Cells where prompts are lost."""
    return "; ".join(
        f"{r.fewer:.1f} fewer at {r.tokens} tokens, {r.budget:g}, window {r.window}"
        for r in cells.itertuples()
    )


def frozen(frame: pd.DataFrame) -> Iterator[Told]:
    """A row a kind of fit, window and budget of which so much of the cache was freed."""
    table = freezing.summary(frame).sort_values(["window", "budget"], ascending=[False, True])
    for row in table[(table["rule"] == "free") & (table["asked"] == FROZEN)].itertuples():
        cell = dict(zip(table.columns, row[1:], strict=True))
        lost, error = cell["lost, %"], cell["SE"]
        yield {
            "what": f"memory of the cache freed at {cell['budget']:g}, window {cell['window']}, "
            f"fitted by {cell['fit']}",
            "aim": f"{FROZEN:.0%} at no more than {ITS_AIM} points",
            "read": f"{cell['bytes freed, %']:.1f}% at {lost:.3f} +- {error:.3f}",
            "n": f"{number(cell['seeds'], 'seed')}, {cell['windows']} windows",
            "met": judged(lost, error, ITS_AIM, 3),
        }


def held(frame: pd.DataFrame) -> Iterator[Told]:
    """A row a budget: how far the farthest of four kinds of text is from it."""
    for _, part in holding.summary(frame).groupby("budget"):
        far = part.set_index("way")["farthest"]
        yield {
            "what": f"executed cost on four kinds of text, budget {part['budget'].iloc[0]:g}",
            "aim": f"within {APART} of it",
            "read": f"{far['held']:.3f} away under `router.holding`, {far['at one price']:.3f} at "
            "one price",
            "n": f"1 seed, {part['windows'].iloc[0]} windows of each",
            "met": "**met** by holding" if far["held"] <= APART else "**missed**",
        }


def table() -> pd.DataFrame:
    """All rows."""
    share = read("share")
    rows = [*perplexity(share), *rivals(share), *single(share), *retrieval(read("retrieval"))]
    rows += [*frozen(read("freezing")), *held(read("holding"))]
    rows += rivals(read("gemma"), "Gemma 3 270M: ")
    return pd.DataFrame(rows)


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--retrieval", action="store_true", help="print every cell of retrieval")
    shown = wide(read("retrieval")) if parser.parse_args().retrieval else table()
    print("\n".join(lines(shown)))


if __name__ == "__main__":
    sys.exit(main())
