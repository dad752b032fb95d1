"""Holds the figures of the pages to the committed results that they are printed from.

    python -m analysis.bound            names every figure that no result is behind; exit status 1
                                        if one of them is not among those known to have none
                                        (`analysis/unbound.txt`, with the reason)
    python -m analysis.bound --blind    how many would be missed if their last digit were another

The README has a check of its own, sentence by sentence (`analysis.quoted`); here a figure is bound
if it is, to the digits shown, a value of the tables that its section names: by file
(`results/NAME.csv`) or by the command that prints them. A figure is anything with a decimal point,
a percent sign or a factor (2x) outside of code. Settings (a budget, a rate), aims, and what its
paragraph says was read by hand are no claims of a table and are left out.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.pretrained.bisect import effects
from analysis.pretrained.figure import lost as lost_against_original
from analysis.pretrained.freezing import summary
from analysis.pretrained.table import below, losses, retrieved
from analysis.routes.tiny_lm import summarise

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "analysis").glob("*.md"))]
FIGURE = re.compile(
    r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+(?:x\b|%)?|(?<=\d)(?:x\b|%))"
)

PRINTS = {
    "routes.tiny_lm": ("tiny_lm", "recipe", "long"),
    "routes.dial": ("dial", "dial_conservative"),
    "routes.recall": ("recall",),
    "routes.unsure": ("unsure_paired",),
    "posterior": (
        "uncertainty_evidence",
        "uncertainty_confidence",
        "uncertainty_risk",
        "uncertainty_quality",
        "uncertainty_figures",
        "uncertainty_k_hat",
    ),
    "posterior smollm2-135m": (
        "patch_evidence",
        "patch_confidence",
        "patch_risk",
        "patch_guard",
        "patch_quality",
        "patch_prices",
        "patch_decoding",
    ),
    "speed.kernels": ("speed_cuda", "speed_cpu"),
    "speed.speed_model": ("speed_model_cpu", "speed_model_cuda"),
    "speed.patched": ("patched_cuda",),
    "speed.units": ("units_cuda",),
    "speed.growth": ("growth",),
    "speed.neighbour": ("neighbour_cpu",),
    "speed.streaming_memory": ("streaming_memory",),
    "speed.training_step": (
        "training_step_cpu",
        "training_step_nvidia_h100_80gb_hbm3_graph",
        "training_step_nvidia_h100_80gb_hbm3_compiled_graph",
    ),
    "pretrained.table": ("pretrained",),
    "pretrained.bisect": ("pretrained_bisect",),
    "pretrained.freezing": ("pretrained_freezing",),
    "pretrained.smollm": ("patch_smollm",),
    "pretrained.speed": ("patch_speed_cpu",),
}
"""The committed tables of each command, `python -m analysis.NAME`."""

SETTING = (
    r"(?:aims?|aimed|missed|budgets?|price|rates?|weight|totals?|share|temperature|tolerance|"
    r"threshold|promised?|confidence|limit|spend|torch|Triton|transformers|Python|numpy|arXiv|"
    r"at most|at least)"
)
LEFT_OUT = re.compile(
    r"(?:\bat )?\b95%|\d\.?\d*e-?\d+|"
    rf"\b{SETTING}(?: (?:of|at|was|is|than|by))*(?: (?:at least|at most|up to|near|by))?"
    r"[ :(]*(?:[-+]?\d*\.?\d+[x%]?(?:, | and | to | or |; )?)+"
)

NO_CLAIM = ["seed", "seconds", "price", "tokens", "parameters", "lr", "turns", "run", "window"]
"""Columns whose numbers no page claims."""


class Unbound(NamedTuple):
    """A figure without a result."""

    page: str
    heading: str
    figure: str
    near: str

    def __str__(self) -> str:
        return f"{self.page}, {self.heading}: {self.figure} in '{self.near}'"


def tables(name: str) -> Iterator[pd.DataFrame]:
    """A committed table, and what the commands that print it make of its rows."""
    frame = pd.read_csv(RESULTS / f"{name}.csv")
    if "right" in frame:
        yield retrieved(frame)
    if name == "pretrained_freezing":
        yield summary(frame)
        yield frame[["bytes", "bytes_before"]] / 1e6
    elif name.startswith("pretrained") and "piece" in frame and "lost" in frame:
        yield losses(frame)
        for rival in frame["contender"].unique():
            yield from (below(frame, rival, window) for window in frame["window"].unique())
    elif name == "pretrained_bisect":
        yield effects(frame)
    elif name.startswith("patch_smollm"):
        yield lost_against_original(frame)
    elif {"nll_hard", "contender", "routing_entropy"} <= set(frame):
        table = summarise(frame)
        yield table.assign(gap=table["nll_hard"] - table["nll_mean"])
        yield from paired(frame)
        yield frame[["nll_hard", "nll_mean", "cost_paper"]].assign(
            gap=frame["nll_hard"] - frame["nll_mean"]
        )
    elif name == "dial":
        groups = frame.groupby("budget")["nll_hard"]
        yield pd.DataFrame({"mean": groups.mean(), "se": groups.sem()}).reset_index()
    elif name == "patched_cuda":
        keys = ["what", "shape", "unit", "context", "batch", "contender", "best", "run"]
        yield frame.groupby(keys)[["ms", "ratio"]].mean()
    elif name == "uncertainty_k_hat":
        keys = ["target", "length"]
        yield frame.groupby(keys).median(numeric_only=True)
        yield frame.groupby(keys).mean(numeric_only=True)
    else:
        yield frame


def paired(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Ours less the layout that it starts on, and less another router from there, by seed."""
    for _, cell in frame.groupby(["corpus", "context"]):
        by_seed = cell.pivot_table(index="seed", columns="contender", values="nll_hard")
        flops = cell.groupby("contender")["cost_flops"].mean()
        for name in by_seed.columns:
            layout = name.removeprefix("ours, from ")
            for rival in (f"static {layout}", f"softmax router, from {layout}"):
                if name.startswith("ours, from ") and rival in by_seed:
                    apart = (by_seed[name] - by_seed[rival]).dropna()
                    fewer = 1 - flops[name] / flops[rival]
                    yield pd.DataFrame({"v": [apart.mean(), apart.sem(), fewer]})


@cache
def values(name: str) -> np.ndarray:
    """Every number of a table, once."""
    claimed = [frame.drop(columns=NO_CLAIM, errors="ignore") for frame in tables(name)]
    numbers = [frame.select_dtypes("number").to_numpy(float).ravel() for frame in claimed]
    found = np.unique(np.concatenate(numbers))
    return found[np.isfinite(found)]


def shown(figure: str) -> tuple[float, float, str]:
    """Value, half of its last digit, and its unit: %, x or none."""
    unit = figure[-1] if figure[-1] in "%x" else ""
    digits = figure.rstrip("%x").replace(",", "")
    decimals = len(digits.partition(".")[2])
    return float(digits), 0.5 * 10.0**-decimals, unit


def is_among(figure: str, pool: np.ndarray, before: str = "", after: str = "") -> bool:
    """Whether `figure` is a value of `pool` to the digits shown, as a share or its rest for %.

    What stands before and after tells the unit of '9.8% (6.7 to 13.0)' and of '5.3 million'.
    """
    value, half, unit = shown(figure)
    if re.search(r"%\*{0,2} \([^)]*$", before):
        unit = "%"
    if after.startswith(" million"):
        pool = pool / 1e6
    forms = [pool, -pool]  # 'lies below by'
    if unit == "%":
        forms += [100 * pool, -100 * pool, 100 * (1 - pool)]
    return any(bool((np.abs(form - value) <= half * 1.0001).any()) for form in forms)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Heading and text of each part of a page."""
    for part in re.split(r"^#+ ", text, flags=re.M)[1:]:
        heading, _, body = part.partition("\n")
        yield heading, body


def sources(section: str) -> list[str]:
    """Names of the tables that a section names, by file or by command."""
    flat = " ".join(section.split())
    named = [n for n in re.findall(r"(\w+)\.csv", flat) if (RESULTS / f"{n}.csv").is_file()]
    for command, made in PRINTS.items():
        if f"python -m analysis.{command}" in flat:
            named += made
    return list(dict.fromkeys(named))


def parts(section: str) -> list[str]:
    """Paragraphs, items of lists, tables."""
    return re.split(r"\n\s*\n|\n(?=\s*- )", re.sub(r"```.*?```", "", section, flags=re.S))


def blocks(part: str) -> Iterator[str]:
    """A paragraph or item, and the rows of a table, without columns of aims."""
    rows = [line for line in part.splitlines() if line.lstrip().startswith("|")]
    yield " ".join(line for line in part.splitlines() if not line.lstrip().startswith("|"))
    aims: set[int] = set()
    for number, row in enumerate(rows):
        cells = row.strip().strip("|").split("|")
        if number == 0:
            aims = {i for i, cell in enumerate(cells) if re.search("aim|target", cell)}
            continue
        yield " | ".join(cell for i, cell in enumerate(cells) if i not in aims)


def figures(block: str) -> Iterator[re.Match[str]]:
    """What a block claims."""
    if "by hand" in block:
        return
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", lambda m: " " * len(m[0]), block)
    plain = LEFT_OUT.sub(lambda m: " " * len(m[0]), plain)
    yield from FIGURE.finditer(plain)


def read_page(page: Path) -> Iterator[tuple[str, str, re.Match[str], np.ndarray]]:
    """Heading, block, figure, and the values that may stand behind it, of each figure."""
    text = page.read_text(encoding="utf-8")
    for heading, section in sections(text):
        named = list[str]()
        printed = " ".join(re.findall(r"```text\n(.*?)```", section, flags=re.S))
        own = np.array([shown(one)[0] for one in FIGURE.findall(printed)])
        for part in parts(section):
            named = sources(part) or named  # or what a paragraph before it has named
            pool = np.concatenate([own, *(values(name) for name in named)])
            for block in blocks(part):
                for found in figures(block):
                    yield heading, block, found, pool


def known() -> set[tuple[str, str]]:
    """Page and figure of each line of the list of those that have no result."""
    lines = (Path(__file__).parent / "unbound.txt").read_text(encoding="utf-8").splitlines()
    return {(page, one) for page, one, *_ in map(str.split, filter(None, lines)) if page != "#"}


def unbound(page: Path) -> list[Unbound]:
    """The figures of a page that no result is behind."""
    name = str(page.relative_to(ROOT))
    return [
        Unbound(name, heading, found[0], block[max(0, found.start() - 40) : found.end() + 20])
        for heading, block, found, pool in read_page(page)
        if not is_among(found[0], pool, block[: found.start()], block[found.end() :])
    ]


def blind(pages: Sequence[Path] = tuple(PAGES)) -> tuple[int, int]:
    """How many of the bound figures, each with another last digit, would still pass; and of all."""
    passed, tried = 0, 0
    for page in pages:
        for _, _, found, pool in read_page(page):
            value, half, unit = shown(found[0])
            decimals = len(found[0].rstrip("%x").partition(".")[2])
            for step in (-3, -2, 2, 3):
                tried += 1
                passed += is_among(f"{value + 2 * half * step:.{decimals}f}{unit}", pool)
    return passed, tried


def main() -> int:
    """Compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blind", action="store_true", help="change each figure, and count")
    if parser.parse_args().blind:
        passed, tried = blind()
        print(f"{passed} of {tried} changed figures would pass ({passed / tried:.0%})")
        return 0
    found = [one for page in PAGES for one in unbound(page)]
    new = [one for one in found if (one.page, one.figure) not in known()]
    count = sum(1 for page in PAGES for _ in read_page(page))
    print(
        "\n".join(map(str, new)) or "every figure is in a committed result, or known to be in none"
    )
    print(f"{count} figures, {len(found)} of them without a result, {len(new)} of these unknown")
    return int(bool(new))


if __name__ == "__main__":
    sys.exit(main())
