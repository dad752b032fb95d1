"""How the words of a page name rows and columns of a committed table."""

import re
from collections.abc import Iterable
from functools import cache

KEYS = {
    **dict.fromkeys(["budget", "window", "keys", "threshold", "tolerance", "promise"], ["{v}"]),
    **dict.fromkeys(["rise", "asked", "windows", "layers"], ["{v}"]),
    **dict.fromkeys(["context", "length", "T"], ["{v}", "T{v}"]),
    **dict.fromkeys(["batch", "B"], ["batch {v}", "batch of {v}", "B{v}"]),
    **dict.fromkeys(["heads", "H"], ["{v} heads", "H{v}"]),
    **dict.fromkeys(["head_dim", "Dh"], ["heads of {v}", "Dh{v}"]),
}
"""Columns of numbers that say which row it is, and how a page writes them."""

STRICT = ["figure", "stated by", "score"]
"""Columns whose words are too common for prose to name them."""

WIDE = ["text", "corpus", "what", "shape", "mix"]
"""Columns that a heading or a paragraph may name for all that stands in it."""

REFERENCES = ["full", "full attention", "static f", "original", "unpatched"]
REFERENCES += [f"unpatched, {how}" for how in ("graph", "compiled", "static cache, graph")]
"""What others are compared with: a sentence that names none but these is of the others."""

UNNAMED = ["against", "best", "variant", "device", "torch", "versions", "command", "commit"]
"""Columns of words that do not say what a row is."""

ALIASES = {
    "sotu": ["state of the union"],
    "stdlib": ["python"],
    "code": ["python source", "code"],
    "text:corpora/novels100": ["novels"],
    "text:corpora/zig": ["zig"],
    "text:corpora/headers": ["headers"],
    "wikitext103": ["wikitext"],
    "shuffled": ["shuffled"],
    "recent": ["last 128 tokens", "by passages"],
    "token": ["token alone", "by the token"],
    "posterior": ["posterior's own", "the posterior"],
    "stated": ["says", "is stated"],
    "right": ["is right"],
    "ece": ["calibration error", "ece"],
    "gain": ["brier score"],
    "rank": ["rank correlation", "ranks"],
    "reference: every route's prediction": ["prediction under every route", "both predictions"],
    "reference: measured twice": ["under another", "two measures"],
    "reference: the spread itself": ["difference of the two losses"],
    "other authors": ["others", "another author", "the control"],
    "novels by others, first half": ["gissing"],
    "novels by others, last half": ["kipling"],
    "rank correlation of the entropy": ["the entropy alone"],
    "guard": ["guarded", "the guard"],
    "decode": ["decoding", "decodes"],
    "forward+backward": ["forward and backward", "backward"],
    "alone": ["linear and local alone"],
    "prefill": ["prefill", "prompt"],
    "head": ["query head"],
    "kv_head": ["key head"],
    "llama-1b, 8 layers": ["llama's 1b shape", "llama's shape"],
    "smollm2-135m, 30 layers": ["smollm2's shape"],
    "no pyro": ["without pyro"],
    "needle": ["single needles"],
    "many needles": ["several keys"],
    "own, its most familiar window": ["a window of own text"],
    "own, its least familiar window": ["a window of own text"],
    "routed as fitted, graph": ["the fitted patch"],
    "unpatched, graph": ["unpatched"],
    "unpatched, static cache, graph": ["unpatched"],
    "unpatched, compiled": ["unpatched"],
    "as shipped, graph": ["as shipped"],
    "routed": ["mixed route"],
    "local alone": ["local"],
    "by the mean": ["by the mean, rate 0.01"],
    "by the mean, biases first, averaged": ["by the mean, rate 0.01, biases first, averaged"],
    "by the mean, rate 0.003, sharpened": ["by the mean, rate 0.003, draws sharpened"],
    "by the mean, rate 0.003, narrower range": ["by the mean, rate 0.003, a range of"],
    "ours, paper's experts": ["ours, the paper's experts"],
    "rate 0.003": ["by draws, rate 0.003"],
    "token x query head": ["by draws, rate 0.01", "ours"],
    "softmax router": ["softmax routers"],
    "softmax": ["softmax router"],
    "Dirichlet, literal ELBO": ["the literal elbo"],
    "bayes": ["ours"],
    "static f": ["full attention"],
    "one window": ["one window of equal cost"],
    "one window of equal cost": ["one window"],
    "random": ["at random"],
    "probability": ["old probability"],
}
"""Words of the pages for a value, where they are not the value itself."""

COMMON = ["alone", "token"]
"""Values that are words of any sentence: their aliases name them."""

RATIOS = re.compile(r"speed|ratio|over|growth|costs|time|memory|fewer|ideal")
"""Columns that a figure with an x may be of."""

SPREAD = re.compile(r"(?i:se|error|between|.*error|low|high|most|se of .*|.*[ _](?:low|high))$")
"""Columns of errors and ends of intervals: what stands behind +- or in brackets is of these."""

MEASURES = {
    r"\bcosts?\b(?! over)": r"cost(?! over)",
    r"\blost\b|perplexity": r"lost|below|perplexity",
    r"nll hard": r"nll_hard",
    r"\bpaired\b": r"below",
    r"nll mean": r"nll_mean",
    r"\binformation\b": r"information",
    r"tokens/s": r"tokens",
    r"\bms\b": r"ms",
    r"\bgib\b": r"gib",
    r"\bse\b": SPREAD.pattern,
    r"\bbusy\b": r"^(?!wall)",
    r"\balone\b": r"wall|over",
}
"""Words for a measure in a table's heads, and the columns that hold it."""


def plain(words: str) -> str:
    """Without marks of Markdown and intervals, in small letters."""
    words = re.sub(r"\((?:SE )?[-+]?\d*\.\d+%?(?: to [^)]*)?\)", " ", words)
    words = re.sub(r"T?\d[\d,.]*%? to \d[\d,.]*%?", " ", words)
    return " ".join(re.sub(r"[*`_|]", " ", words).lower().split())


@cache
def forms(column: str, value: str | float) -> list[str]:
    """Regular expressions of how a page writes a value of a column that names rows."""
    if isinstance(value, str):
        words = ALIASES.get(value, []) + ([] if value in COMMON else [plain(value)])
        if layout := re.fullmatch(r"static ([fgl]+)", value):
            words.append(layout[1])
        if start := re.fullmatch(r"(?:ours|softmax router), (from [fgl]+)", value):
            words.append(start[1])
        if share := re.match(r"(?:routed|random) (0|0\.\d+)(?:,|$)", value):
            words.append(f"{100 * float(share[1]):g}%" if float(share[1]) else "none")
        return [rf"(?<![\w.]){re.escape(one)}(?!\w)" for one in words]
    shown = {f"{value:g}", f"{value:.1f}", f"{value:.2f}", f"{value:.0f}", f"{value:,.0f}"}
    shown = {one for one in shown if float(one.replace(",", "")) == value}
    shown |= {one.removeprefix("0") for one in shown if one.startswith("0.")}
    if 0 < value < 1:
        shown.add(f"{100 * value:g}%")
    if value == 0:
        shown.add("none")
    written = [form.lower().replace("{v}", one) for form in KEYS[column] for one in shown]
    return [rf"(?<![\w.,-]){re.escape(one)}(?![\w%]|[.,]\d)" for one in written]


def named(column: str, values: Iterable[str | float], words: str) -> tuple[set[str | float], str]:
    """Which of them the words name, and the words that are left.

    A longer name is not one of the shorter within it.
    """
    written = [
        (found[0], value)
        for value in values
        if value != ""
        for form in forms(column, value)
        for found in re.finditer(form, words)
    ]
    chosen = set[str | float]()
    for length in sorted({len(text) for text, _ in written}, reverse=True):
        same = [(text, value) for text, value in written if len(text) == length and text in words]
        chosen |= {value for _, value in same}
        for text, _ in same:
            words = words.replace(text, " | ")
    return chosen, words


def asks(column: str, level: int, cell: bool) -> bool:
    """Whether words of this level, 0 being the nearest, may name values of a column.

    In prose they are clause and sentence, of a table its own row and the one above.
    """
    if cell:
        return level < 2 or column in KEYS or column in WIDE
    near = column in KEYS or column in ("what", "mix", "shape")
    return column not in STRICT and level < (1 if near else 2)
