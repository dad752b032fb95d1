"""Holds the figures of the pages to the committed results that they are printed from.

    python -m analysis.bound            names every figure that no result is behind; exit status 1
                                        if one of them is not among those known to have none
                                        (`analysis/unbound.txt`, with the reason)
    python -m analysis.bound --blind    how many would be missed if their last digit were another
                                        (each other digit is tried)

The README has a check of its own, sentence by sentence (`analysis.quoted`); here a figure is bound
if it is, to the digits shown, a value of the tables that its paragraph names, by file
(`results/NAME.csv`) or by the command that prints them, and there of the rows and columns that the
words around it name (`analysis.behind`); an error or interval is of the row of its figure. A figure
is anything with a decimal point, a percent sign or a factor (2x) outside of code. Settings (a
budget, a rate), aims, and what its paragraph says was read by hand or is in no table are no claims
of a table and are left out.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.behind import RESULTS, Wanted, matches, shown, values

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "analysis").glob("*.md"))]
FIGURE = re.compile(
    r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+(?:x\b|%)?|(?<=\d)(?:x\b|%))"
)

PRINTS = {
    "routes.tiny_lm": ("tiny_lm",),
    "routes.tiny_lm --size recipe": ("recipe",),
    "routes.tiny_lm --size long": ("long",),
    "routes.tiny_lm --size cpu": ("tiny_lm_cpu",),
    "routes.tiny_lm --size heads": ("heads",),
    "routes.tiny_lm --size quoting": ("quoting",),
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
        "uncertainty_guard",
        "uncertainty_decoding",
    ),
    "posterior smollm2-135m-teacher": (
        "patch_evidence",
        "patch_confidence",
        "patch_risk",
        "patch_guard",
        "patch_quality",
        "patch_prices",
        "patch_decoding",
    ),
    "speed.kernels": ("speed_cuda", "speed_cpu"),
    "speed.unsorted": ("unsorted_cuda",),
    "speed.speed_model": ("speed_model_cpu", "speed_model_cuda"),
    "speed.patched": ("patched_cuda",),
    "speed.units": ("units_cuda",),
    "speed.watching": ("watching_cpu", "watching_cuda"),
    "speed.growth": ("growth",),
    "speed.neighbour": ("neighbour_cpu",),
    "speed.streaming_memory": ("streaming_memory",),
    "speed.training_step": (
        "training_step_cpu",
        "training_step_nvidia_h100_80gb_hbm3_graph",
        "training_step_nvidia_h100_80gb_hbm3_compiled_graph",
    ),
    "pretrained.table": ("pretrained",),
    "pretrained.verdict": ("pretrained_share",),
    "pretrained.aims": tuple(
        f"pretrained_{name}" for name in ("share", "retrieval", "freezing", "holding", "gemma")
    ),
    "pretrained.aims --retrieval": ("pretrained_retrieval",),
    "pretrained.bisect": ("pretrained_bisect",),
    "pretrained.freezing": ("pretrained_freezing",),
    "pretrained.smollm": ("patch_smollm",),
    "pretrained.speed": ("patch_speed_cpu",),
}
"""The committed tables of each command, `python -m analysis.NAME`."""

SETTING = (
    r"(?:aims?|aimed|missed|budgets?|price|rates?|weight|totals?|share|temperature|tolerance|"
    r"threshold|promised?|confidence|limit|spend|torch|Triton|transformers|Python|numpy|arXiv|"
    r"at most|at least|more than|less than|factor|within|range)"
)
LEFT_OUT = re.compile(
    r"(?:\bat )?\b95%|\d\.?\d*e-?\d+|\d+%(?= (?:and \d+% )?(?:of the tokens )?on full)|"
    rf"\b{SETTING}(?: (?:of|at|was|is|than|by|from|drawn|are missed))*"
    r"(?: (?:at least|at most|up to|near|by))?"
    r"[ :(*]*(?:[-+]?\d*\.?\d+[x%]?(?:, | and not | and | to | or |; )?)+"
)
"""Settings, aims and what is computed from them."""

NOT_KEPT = re.compile(r"by hand|in no table|earlier readings?")
"""Words by which a page says that no table has what a sentence or cell gives."""


class Unbound(NamedTuple):
    """A figure without a result."""

    page: str
    heading: str
    figure: str
    near: str

    def __str__(self) -> str:
        return f"{self.page}, {self.heading}: {self.figure} in '{self.near}'"


LESS = re.compile(
    r"\b(?:below|less|lower|fewer|behind|better|ahead|worse|falls?|saves?|pay|apart)\b"
)
"""Words by which a page gives a difference without its sign."""

REST = re.compile(r"\b(?:freed|fewer|saves?|saved|rest|too low)\b")
"""Words by which a page gives what is missing of a whole."""


def is_among(figure: str, pool: np.ndarray, before: str = "", after: str = "") -> bool:
    """Whether `figure` is a value of `pool` to the digits shown, as a share or its rest for %.

    What stands before and after tells the unit of '9.8% (6.7 to 13.0)' and of '5.3 million'.
    """
    percent = figure.endswith("%") or bool(re.search(r"%\*{0,2}(?: more)? \([^)]*$", before))
    around = f"{before} {after}"
    if after.startswith(" million"):
        pool = pool / 1e6
    forms = [pool, -pool] if LESS.search(around) else [pool]
    if percent and REST.search(around):
        forms.append(1 - pool)
    return any(matches(figure, form, percent).any() for form in forms)


HEAD = re.compile(
    rf"(?<! to )({FIGURE.pattern})\**(?: more| points| of the time| times| on \w+)*"
    r"(?: \+- | \((?:SE )?(?:over pieces )?)(?:[-+]?[\d.]+%? to\s+)?$"
)
"""What stands before an error or an end of an interval: the figure that it is of."""


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Heading and text of each part of a page."""
    for part in re.split(r"^#+ ", text, flags=re.M)[1:]:
        heading, _, body = part.partition("\n")
        yield heading, body


def sources(section: str) -> list[str]:
    """Names of the tables that a section names, by file or by a command that names no file.

    '`python -m analysis.routes.tiny_lm`, and the same with `--size long`' are two commands.
    """
    flat = " ".join(section.split())
    named = [n for n in re.findall(r"(\w+)\.csv", flat) if (RESULTS / f"{n}.csv").is_file()]
    commands = re.findall(r"python -m analysis\.([^`]*)", flat)
    commands += [f"routes.tiny_lm {size}" for size in re.findall(r"`(--size \w+)`", flat)]
    for command in commands:
        files = [n for n in re.findall(r"(\w+)\.csv", command) if (RESULTS / f"{n}.csv").is_file()]
        known = [one for one in PRINTS if f"{command} ".startswith(f"{one} ")]
        if known and not files:
            named += PRINTS[max(known, key=len)]
    return list(dict.fromkeys(named))


def parts(section: str) -> list[str]:
    """Paragraphs, items of lists, tables."""
    return re.split(r"\n\s*\n|\n(?=\s*- )", re.sub(r"```.*?```", "", section, flags=re.S))


class Passage(NamedTuple):
    """A sentence, or a cell of a table: what it says, and the words around it, nearest first."""

    text: str
    around: tuple[str, ...]
    cell: bool = False


WORDS = 4
"""Above so many words a cell is a sentence of its own."""


def heads(row: list[str]) -> list[str]:
    """Of a table's columns; what '.4' or 'lost' leaves out of 'novels .5' or 'novels: cost'."""
    found, first = [], ""
    for head in row:
        lead = re.match(r"(.+?)(?::\s|\s(?=\.\d))", head.strip())
        first = lead[1] if lead else first
        found.append(head if lead or not first else f"{first} {head}")
    return found


def cells(lines: list[str], before: str) -> Iterator[Passage]:
    """Of a table, without columns of aims and of what was read by hand.

    An empty first cell, and 'same', are the one above.
    """
    table = [line.strip().strip("|").split("|") for line in lines]
    head, carried = heads(table[0]), ""
    for row in table[2:]:
        first = row[0].strip()
        elsewhere = re.match(r"same|the same|\W*$", first)
        carried = f"{carried} {first}" if elsewhere else first
        label = " ".join([first, *(one for one in row[1:] if not FIGURE.search(one))])
        for at, (name, cell) in enumerate(zip(head, row, strict=False)):
            sentence = len(re.findall(r"[a-z]{2,}", cell)) > WORDS
            if re.search("aim|target|by hand", name) or not (at or sentence):
                continue
            near = (f"{name} {label}", carried, head[0], before)
            if sentence:
                yield Passage(cell, (f"{label} {cell}", before))
            else:
                yield Passage(cell, near, cell=True)


def sentences(text: str) -> Iterator[str]:
    """Of a paragraph."""
    yield from re.split(r"(?<=[.:;])\s+(?=[A-Z*`(])", text)


def clause(sentence: str, at: int) -> str:
    """What of a sentence stands around a place, between commas and the like."""
    breaks = [0, *(one.end() for one in re.finditer(r"[,;:] | and ", sentence)), len(sentence)]
    start = max(one for one in breaks if one <= at)
    return sentence[start : min(one for one in breaks if one > at)]


def blocks(part: str, heading: str, before: str) -> Iterator[Passage]:
    """The sentences of a paragraph or item, and the cells of a table."""
    rows = [line for line in part.splitlines() if line.lstrip().startswith("|")]
    text = " ".join(line for line in part.splitlines() if not line.lstrip().startswith("|"))
    for one in () if "by hand" in text else sentences(text):
        yield Passage(one, (one, text, heading))
    for block in cells(rows, f"{text} {before}") if rows else ():
        yield block._replace(around=(*block.around, heading))


def figures(block: str) -> Iterator[re.Match[str]]:
    """What a block claims."""
    if NOT_KEPT.search(block):
        return
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", lambda m: " " * len(m[0]), block)
    plain = LEFT_OUT.sub(lambda m: " " * len(m[0]), plain)
    yield from FIGURE.finditer(plain)


class Figure(NamedTuple):
    """A figure of a page, where it stands, and what may stand behind it."""

    heading: str
    block: str
    found: re.Match[str]
    own: np.ndarray
    asked: Wanted

    def passes(self, figure: str) -> bool:
        """Whether a committed table has `figure` where this one stands."""
        pool = np.concatenate([self.own, values(self.asked)])
        before, after = self.block[: self.found.start()], self.block[self.found.end() :]
        return is_among(figure, pool, before, after)


def unnamed(text: str, found: re.Match[str]) -> str:
    """A sentence without the figures that are no budget or length: this one and heads of errors."""
    text = text[: found.start()] + "|" * len(found[0]) + text[found.end() :]
    return re.sub(
        rf"{FIGURE.pattern}(?=\**(?: points)? \((?:SE |\.?\d|\|))", lambda m: "|" * len(m[0]), text
    )


def asked_of(found: re.Match[str], block: Passage, tables: Sequence[str]) -> Wanted:
    """What of `tables` may stand behind a figure of a block."""
    head = HEAD.search(block.text[: found.start()])
    before = block.text[: found.start()]
    near = () if block.cell else (clause(unnamed(block.text, found), found.start()),)
    loose = not block.cell and (before.count("(") > before.count(")") or "error of" in before)
    return Wanted(
        tables=tuple(tables),
        around=(*near, *block.around),
        cell=block.cell,
        unit=shown(found[0])[2],
        head=head[1] if head else "",
        loose=loose,
    )


def read_page(page: Path) -> Iterator[Figure]:
    """Each figure of a page."""
    for heading, section in sections(page.read_text(encoding="utf-8")):
        named, of_section, before = list[str](), list[str](), ""
        printed = " ".join(re.findall(r"```text\n(.*?)```", section, flags=re.S))
        own = np.array([shown(one)[0] for one in FIGURE.findall(printed)])
        for part in parts(section):
            named = sources(part) or named  # or what a paragraph before it has named
            item, of_item = part.lstrip().startswith("- "), list[str]()
            for block in blocks(part, heading, before):
                of_item = sources(block.text) or of_item  # of an item's sentence and what follows
                here = of_item or (of_section if item else named)
                for found in figures(block.text):
                    yield Figure(heading, block.text, found, own, asked_of(found, block, here))
            of_section = of_section if item else named
            before = " ".join(part.split())


def known() -> set[tuple[str, str]]:
    """Page and figure of each line of the list of those that have no result."""
    lines = (Path(__file__).parent / "unbound.txt").read_text(encoding="utf-8").splitlines()
    return {(page, one) for page, one, *_ in map(str.split, filter(None, lines)) if page != "#"}


def unbound(page: Path) -> list[Unbound]:
    """The figures of a page that no result is behind."""
    name = str(page.relative_to(ROOT))
    return [
        Unbound(name, one.heading, one.found[0], near(one))
        for one in read_page(page)
        if not one.passes(one.found[0])
    ]


def near(figure: Figure) -> str:
    """What stands around it, the row and column of a table too."""
    start, end = figure.found.span()
    words = figure.block[max(0, start - 40) : end + 20]
    return f"{figure.asked.around[0].strip()}: {words}" if figure.asked.cell else words


def blind(pages: Sequence[Path] = tuple(PAGES)) -> tuple[int, int]:
    """How many of the bound figures, each with each other last digit, would pass; and of all."""
    passed, tried = 0, 0
    for page in pages:
        for one in read_page(page):
            for other in last_digits(one.found[0]):
                tried += 1
                passed += one.passes(other)
    return passed, tried


def last_digits(figure: str) -> Iterator[str]:
    """The figure, with each other digit for its last."""
    unit = figure[-1] if figure[-1] in "%x" else ""
    digits = figure.rstrip("%x")
    yield from (f"{digits[:-1]}{one}{unit}" for one in "0123456789" if one != digits[-1])


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
