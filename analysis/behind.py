"""The values of committed tables that may stand behind a figure of a page.

They are those of the rows and columns that the words around it name. A table has columns that say
which row it is (a contender, a text, a budget: `KEYS`, and all words) and columns of what was read.
Where the words nearest to a figure name values of such a column (of a cell the head of its column
and the first cell of its row, in prose its sentence), only their rows count; where they name none,
wider ones are asked (paragraph, heading); where none does, all rows count. In prose 'ours' is any
contender whose name begins so, and a cell counts by its measure (`MEASURES`) too.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.naming import KEYS, MEASURES, RATIOS, REFERENCES, SPREAD, UNNAMED, asks, named, plain
from analysis.pretrained.aims import ITS_AIM, found
from analysis.pretrained.bisect import effects
from analysis.pretrained.figure import lost as lost_against_original
from analysis.pretrained.freezing import summary
from analysis.pretrained.holding import summary as kinds
from analysis.pretrained.table import OURS, below, far, losses, outdone, retrieved
from analysis.pretrained.verdict import apart
from analysis.routes import tiny_lm
from analysis.routes.tiny_lm import summarise

RESULTS = Path(__file__).parent / "results"
BY_HEAD = "ours by head, from gllllf, price 20"
CHEAPER = "ours by head, from gllllf, price 40, straight-through"

NO_CLAIM = ["seed", "seconds", "price", "tokens", "parameters", "lr", "turns", "run"]
"""Columns whose numbers no page claims."""


def tables(name: str) -> Iterator[pd.DataFrame]:
    """A committed table, and what the commands that print it make of its rows."""
    frame = pd.read_csv(RESULTS / f"{name}.csv")
    if "right" in frame:
        yield retrieved(frame)
        yield outdone(frame)
        if name == "pretrained_retrieval":
            yield found(frame)
    if name == "pretrained_freezing":
        told = summary(frame)
        yield told.assign(given=told["asked"], missed=told["lost, %"] - ITS_AIM)
        yield frame[["bytes", "bytes_before"]] / 1e6
    elif name == "pretrained_holding":
        yield frame.groupby(["budget", "way", "text"])[["cost", "keys"]].mean().reset_index()
        yield kinds(frame)[["budget", "way", "farthest"]]
    elif name.startswith("pretrained") and "piece" in frame and "lost" in frame:
        yield losses(frame)
        yield far(frame)
        for rival in set(frame["contender"]) - {OURS}:
            yield from (below(frame, rival, window) for window in frame["window"].unique())
            yield from (apart(frame, rival, window) for window in frame["window"].unique())
    elif name == "pretrained_bisect":
        yield effects(frame)
    elif name.startswith("patch_smollm"):
        yield lost_against_original(frame)
    elif {"nll_hard", "contender", "routing_entropy"} <= set(frame):
        table = summarise(frame)
        yield table.assign(gap=table["nll_hard"] - table["nll_mean"])
        yield from paired(frame)
        if name == "heads":  # beside the layouts by layer, whose seeds are the same
            long = pd.read_csv(RESULTS / "long.csv")
            both = pd.concat([frame, long], ignore_index=True)
            for ours in (BY_HEAD, CHEAPER):
                yield tiny_lm.paired(both, ours)
        labels = ["contender", "corpus", "context", "seed"]
        yield frame[[*labels, "nll_hard", "nll_mean", "cost_paper"]].assign(
            gap=frame["nll_hard"] - frame["nll_mean"]
        )
    elif name == "dial":
        groups = frame.groupby("budget")["nll_hard"]
        yield pd.DataFrame({"nll_hard": groups.mean(), "se": groups.sem()}).reset_index()
    elif name == "dial_conservative":
        yield frame
        groups = frame.groupby(["threshold", "budget"])["difference"]
        yield pd.DataFrame({"difference": groups.mean(), "se": groups.sem()}).reset_index()
    elif name == "uncertainty_k_hat":
        keys = ["target", "length"]
        yield frame.groupby(keys).median(numeric_only=True).reset_index()
        yield frame.groupby(keys).mean(numeric_only=True).reset_index()
    elif name.startswith("patch_speed"):  # a step is read behind a little less than a whole text
        yield frame.replace({"context": {3904: 4096, 8000: 8192}})
    else:
        yield frame


def paired(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Ours less the layout that it starts on, and less another router from there, by seed."""
    for (corpus, context), cell in frame.groupby(["corpus", "context"]):
        by_seed = cell.pivot_table(index="seed", columns="contender", values="nll_hard")
        flops = cell.groupby("contender")["cost_flops"].mean()
        for name in by_seed.columns:
            layout = name.removeprefix("ours, from ")
            for rival in (f"static {layout}", f"softmax router, from {layout}"):
                if name.startswith("ours, from ") and rival in by_seed:
                    apart = (by_seed[name] - by_seed[rival]).dropna()
                    fewer = 1 - flops[name] / flops[rival]
                    row = {"corpus": corpus, "context": context, "layout": layout}
                    row |= {"apart": apart.mean(), "se": apart.sem(), "fewer": fewer}
                    yield pd.DataFrame([row])


class Parsed(NamedTuple):
    """A table's rows: what names them, and what was read."""

    names: dict[str, np.ndarray]
    read: dict[str, np.ndarray]
    by_seed: bool
    """Whether its rows are runs: a page's tables have means of them."""


@cache
def parsed(name: str) -> list[Parsed]:
    """The tables of one name, once."""
    found = []
    for frame in tables(name):
        numbers = frame.select_dtypes("number")
        words = frame.select_dtypes(exclude=["number", "bool"]).fillna("").astype(str)
        labels = {c: words[c].to_numpy() for c in words if c not in UNNAMED}
        labels |= {c: numbers[c].to_numpy(float) for c in KEYS if c in numbers}
        read = numbers.drop(columns=[*KEYS, *NO_CLAIM], errors="ignore")
        several = {c: one for c, one in labels.items() if len(set(one)) > 1}
        columns = {c: read[c].to_numpy(float) for c in read}
        found.append(Parsed(several, columns, "seed" in frame and frame["seed"].nunique() > 1))
    return found


class Wanted(NamedTuple):
    """What of the tables may stand behind a figure, by the page."""

    tables: tuple[str, ...]
    around: tuple[str, ...]
    """The words around it, the nearest first."""
    cell: bool
    """Whether it stands in a table of the page."""
    unit: str
    """%, x or none."""
    head: str
    """The figure whose error or interval it is; it is of the same row. None where it is empty."""
    loose: bool
    """Whether it may be an error or an end of an interval itself: in brackets, in prose."""


def rows_of(table: Parsed, around: Sequence[str], cell: bool) -> tuple[np.ndarray, str]:
    """Which rows of a table the words name, and what of the nearest is left to name a measure.

    Wider words that leave no row of those that nearer ones name speak of other rows.
    """
    rows = np.ones(len(next(iter(table.read.values()), [])), bool)
    unnamed, rest = list(table.names), around[0]
    for level, words in enumerate(around):
        for name in [one for one in unnamed if asks(one, level, cell)]:
            values = set(table.names[name])
            if name == "text" and re.search(r"(?:every|any|either|all) texts?\b", words):
                chosen = values
            else:
                chosen, words = named(name, values, words)
            rest = words if level == 0 else rest
            if chosen and not cell and name not in KEYS:
                begins = tuple(map(str, chosen))
                compared = chosen.issubset(REFERENCES)
                chosen = {one for one in values if compared or str(one).startswith(begins)}
            if chosen:
                unnamed.remove(name)
                fewer = rows & np.isin(table.names[name], [*chosen, *values & {""}])
                rows = fewer if fewer.any() or level < 2 else rows
    return rows, rest


def read_of(table: Parsed, asked: Wanted) -> Iterator[np.ndarray]:
    """The numbers of the rows and columns that the words name."""
    one_seed = any("seed 0" in words for words in asked.around)
    if not table.read or (table.by_seed and asked.cell and not one_seed):
        return
    rows, rest = rows_of(table, asked.around, asked.cell)
    spread = [c for c in table.read if SPREAD.match(c)]
    columns = [c for c in table.read if c not in spread or asked.loose] or spread
    if asked.unit == "x":
        columns = [c for c in columns if RATIOS.search(c)] or columns
    if asked.cell:
        corner = asked.around[2]  # of the table, where its heads name no measure
        heads = rest if any(re.search(word, rest) for word in MEASURES) else corner
        for word, pattern in MEASURES.items():
            if re.search(word, heads):
                of = spread if pattern == SPREAD.pattern else columns
                columns = [c for c in of if re.search(pattern, c)] or columns
    if asked.head and spread:
        read = [sign * table.read[c] for c in columns for sign in (1, -1)]
        rows = rows & np.any([matches(asked.head, one, percent=True) for one in read], axis=0)
        columns = spread
    yield from (table.read[c][rows] for c in columns)
    if not asked.cell:  # 'from 0.16 to 1.0': a sentence names what was asked too
        yield from (table.names[c][rows] for c in table.names if c in KEYS)


def shown(figure: str) -> tuple[float, float, str]:
    """Value, half of its last digit, and its unit: %, x or none."""
    unit = figure[-1] if figure[-1] in "%x" else ""
    digits = figure.rstrip("%x").replace(",", "")
    decimals = len(digits.partition(".")[2])
    return float(digits), 0.5 * 10.0**-decimals, unit


def matches(figure: str, read: np.ndarray, percent: bool = False) -> np.ndarray:
    """Which numbers are `figure` to the digits shown; as a share too, if it may be a percentage."""
    value, half, unit = shown(figure)
    forms = [read, 100 * read] if percent or unit == "%" else [read]
    return np.any([np.abs(form - value) <= half * 1.0001 for form in forms], axis=0)


@cache
def values(asked: Wanted) -> np.ndarray:
    """What of the tables a figure may be, by the words around it."""
    asked = asked._replace(around=tuple(map(plain, asked.around)))
    parts = [
        one for name in asked.tables for table in parsed(name) for one in read_of(table, asked)
    ]
    found = np.unique(np.concatenate([np.empty(0), *parts]))
    return found[np.isfinite(found)]
