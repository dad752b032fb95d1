"""Holds the README to the committed results: every figure that it quotes is computed here again.

    python -m analysis.quoted           says which sentences and rows of the README differ;
                                        exit status 1 if any does
    python -m analysis.quoted --print   prints them all, to be copied

A figure is anything with a decimal point, a percent sign or a factor (2x) outside of code. One that
stands in none of the sentences and rows below is refused too, so that no figure enters the README
without a table behind it.
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

from analysis.behind import BY_HEAD
from analysis.pretrained.table import OURS, losses
from analysis.pretrained.verdict import apart
from analysis.routes.tiny_lm import paired, summarise

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FIGURE = re.compile(r"\d+(?:\.\d+)?(?:%|x\b)|\d+\.\d+")
NAMES = {
    "sotu": "State of the Union",
    "stdlib": "Python source",
    "text:corpora/novels100": "novels",
}
ALL = 5
"""Seeds of the rows of the table."""


def read(name: str) -> pd.DataFrame:
    """Rows of a study."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def pretrained() -> list[str]:
    """Routes by query head against the best static choice that was fitted alike."""
    frame = read("pretrained_share")
    frame = frame[(frame["context"] == 8192) & (frame["window"] == 1024)]
    cells = losses(frame[frame["text"] == "novels"]).set_index(["contender", "budget"])
    static = [n for n in cells.index.levels[0] if n.startswith("static")]
    best = min(static, key=lambda name: cells.loc[(name, 0.3), "lost"])
    assert best == "static, query heads"
    cheap = apart(frame[frame["budget"] < 0.5], best, 1024)
    assert (cheap["below"] > 2 * cheap["se"]).all()
    (low, high), (near, far) = (
        [cells.loc[(name, budget)] for budget in (0.3, 0.4)] for name in (OURS, best)
    )
    return [
        f"its {low['seeds']:.0f} seeds lose {low['lost']:.2f}% of perplexity on novels at a budget "
        f"of 0.3 (SE {low['se']:.2f}) and {high['lost']:.2f}% at 0.4 ({high['se']:.2f}); the best "
        f"static rival, query heads chosen once ({near['seeds']:.0f} seeds), {near['lost']:.2f}% "
        f"({near['se']:.2f}) and {far['lost']:.2f}% ({far['se']:.2f})",
    ]


def scratch() -> list[str]:
    """By head, against static layouts as cheap, on Python source; novels have nothing to route."""
    heads, long = read("heads"), read("long")
    table = summarise(heads).set_index(["corpus", "context", "contender"]).loc["stdlib", 2048]
    layers = summarise(long).set_index(["corpus", "context", "contender"])
    ours, start = table.loc[BY_HEAD], layers.loc["stdlib", 2048].loc["static gllllf"]
    static = table[table.index.str.startswith("static") & (table["n"] == ALL)]
    as_cheap = static[static["cost_flops"] < 1.2 * ours["cost_flops"]]
    dearer = static.loc["static gllll, 2 of 4 heads f"]
    assert len(as_cheap) == 3 and (paired(heads, BY_HEAD)["below"] > 0).all()
    novels = layers.loc["text:corpora/novels100", 2048]["nll_hard"]
    assert novels.idxmin() == "static gl"
    low, high = as_cheap["nll_hard"].min(), as_cheap["nll_hard"].max()

    def figure(row: pd.Series) -> str:
        return f"{row['nll_hard']:.3f} (SE {row['se']:.3f}) at {row['cost_flops']:.3f}"

    return [
        f"a route for each head ({ours['n']:.0f} seeds) has {figure(ours)} of the FLOPs",
        f"static layouts ({ALL} seeds) {low:.3f} to {high:.3f} (SE to {as_cheap['se'].max():.3f}) "
        f"as cheap, {figure(dearer)}, and its start {figure(start)}",
    ]


def clock() -> list[str]:
    """Where time is saved, and where not."""
    cpu = read("patch_speed_256_cpu").set_index(["what", "context", "batch", "contender"])
    reading = {n: cpu.loc[("prefill", n, 1, "routed 0.5")] for n in (2048, 8192)}
    quality = read("patch_smollm_256")
    novels = quality[(quality["text"] == "novels")].set_index(["contender", "budget"])
    original = novels.loc[("original", 1.0), "perplexity"]
    at_half = novels.xs(0.5, level="budget")
    static = at_half.drop(index="routed")
    best = static.loc[static["perplexity"].idxmin()]
    assert static["perplexity"].idxmin() == "one window"

    def lost(perplexity: float) -> str:
        return f"{100 * (perplexity / original - 1):.2f}%"

    patched = read("patched_cuda")
    patched = patched[patched["unit"] == "layer"]
    compiled = patched.set_index("contender").loc["routed 0.1, compiled, graph", "ratio"]
    patched = patched[patched["what"] == "prefill"]
    patched = patched[patched["best"] == "unpatched, graph"]
    over = patched.groupby(["shape", "context", "contender"])["ratio"].mean()
    llama = [over[("llama-1b, 8 layers", n, "routed 0.1, graph")] for n in (8192, 32768)]
    eager = over[("smollm2-135m, 30 layers", 8192, "routed 0.1")]
    return [
        f"It costs {reading[8192]['cost']:.3f} there and loses "
        f"{lost(at_half.loc['routed', 'perplexity'])} of perplexity on novels (at "
        f"{at_half.loc['routed', 'cost']:.3f}); its best static rival, one window for all, loses "
        f"{lost(best['perplexity'])} (at {best['cost']:.3f})",
        f"reads 8192 tokens in {reading[8192]['ratio']:.2f} of the unpatched model's time on two "
        "CPU cores",
        f"in {llama[0]:.2f}, 32,768 tokens in {llama[1]:.2f}; both by torch.compile, too, 8192 in "
        f"{compiled:.2f}",
        f"2048 tokens take {reading[2048]['ratio']:.2f} on the CPU",
        f"SmolLM2's shape takes {eager:.2f} at 8192 tokens",
    ]


def dial() -> list[str]:
    """A trained model at other budgets than its own."""
    curve = read("dial").groupby("budget")["nll_hard"].mean()
    return [
        f"from {curve.min():.2f} nats per byte at a budget of {curve.idxmin():.2f} to "
        f"{curve[1.0]:.2f} at 1.0"
    ]


def uncertainty() -> list[str]:
    """What evidence, risk and probability are worth on one run, with intervals over windows."""
    evidence = read("uncertainty_evidence").set_index(["text", "score"]).loc[("code", "recent")]
    risk = read("uncertainty_risk").set_index(["text", "figure"])
    risk = risk.loc[("held out", "rank correlation")]
    posterior = read("uncertainty_confidence").set_index(["stated by", "figure"]).loc["posterior"]
    right = posterior.loc["right"]

    def interval(row: pd.Series) -> str:
        return f"({row['low']:.3f} to {row['high']:.3f}, n = {row['n']:,.0f}"

    return [
        f"AUROC {evidence['auroc']:.3f} {interval(evidence)} bytes)",
        f"rank correlation {risk['value']:.3f} {interval(risk)})",
        f"it says {posterior.loc['stated', 'value']:.3f}, and {right['value']:.3f} are "
        f"{interval(right)})",
    ]


def rows() -> list[str]:
    """The table: every contender with five seeds, best first in each text.

    And, said to be of fewer, `BY_HEAD`.
    """
    studies = ("tiny_lm", "recipe", "long", "heads")
    frame = pd.concat([read(name) for name in studies], ignore_index=True)
    frame = frame.drop_duplicates(["contender", "corpus", "context", "seed"]).drop(columns="lr")
    table = summarise(frame)
    table = table[(table["n"] == ALL) | (table["contender"] == BY_HEAD)]
    table = table[table["context"] <= 2048]  # a longer one stands in the study
    lines = ["| contender | nll HARD | cost, paper | cost, FLOPs |", "|---|---|---|---|"]
    for (corpus, context), group in table.groupby(["corpus", "context"], sort=False):
        least, most = group["se"].min(), group["se"].max()
        lines.append(f"| **{NAMES[corpus]}, {context} bytes** | SE {least:.3f}-{most:.3f} | | |")
        for row in group.to_dict("records"):
            figures = f"{row['nll_hard']:.3f} | {row['cost_paper']:.3f} | {row['cost_flops']:.3f}"
            few = f" ({row['n']} seeds)" if row["n"] < ALL else ""
            lines.append(f"| {short(row['contender'])}{few} | {figures} |")
    return lines


def short(contender: str) -> str:
    """A name as the table has it: `gllll+2/4f` has two of four heads of its last layer on f."""
    name = re.sub(r"(\w+), (\d) of (\d) heads f", r"\1+\2/\3f", contender)
    name = re.sub(r"(\w+), (\d) of (\d) heads window (\d+)", r"\1+\2/\3w\4", name)
    name = name.replace("static: gated, local, gated, full", "static glgf")
    return name.replace("the hybrid", "glgf").replace(", price 20", "")


def sentences() -> list[str]:
    """Every passage with figures."""
    return [*pretrained(), *scratch(), *clock(), *dial(), *uncertainty()]


def problems(readme: str) -> list[str]:
    """What of `readme` is not in the results."""
    flat = " ".join(readme.split())
    passages = [*sentences(), *rows()]
    found = [
        f"missing or different: {one}" for one in passages if " ".join(one.split()) not in flat
    ]
    rest = " ".join(re.sub(r"```.*?```", " ", readme, flags=re.S).split())
    for one in passages:
        rest = rest.replace(" ".join(one.split()), " ")
    rest = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", rest)  # code, and where links lead
    allowed = (
        r"95% intervals|arXiv \d+\.\d+|Python 3\.\d+|version \d+\.\d+|budget of \d\.\d|Apache-2\.0"
    )
    rest = re.sub(allowed, " ", rest)
    return found + [f"no result behind: {figure}" for figure in FIGURE.findall(rest)]


def words(readme: str) -> int:
    """Words of its prose: without blocks of code and tables."""
    prose = re.sub(r"```.*?```", "", readme, flags=re.S)
    return len(" ".join(line for line in prose.splitlines() if not line.startswith("|")).split())


def all_words(readme: str) -> int:
    """Words of code and tables too; a bar or a brace alone is none."""
    return sum(bool(re.search(r"\w", word)) for word in readme.split())


def numbers(readme: str) -> int:
    """Runs of digits, code's and names' too."""
    return len(re.findall(r"\d[\d.,]*", readme))


def main() -> int:
    """Compare, or print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="print every passage")
    if parser.parse_args().print:
        print("\n\n".join(sentences()) + "\n\n" + "\n".join(rows()))
        return 0
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = problems(readme)
    print("\n".join(found) or "every figure of the README is in the committed results")
    counts = f"{words(readme)} words of prose, {all_words(readme)} in all"
    print(f"README: {counts}, {numbers(readme)} numbers")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
