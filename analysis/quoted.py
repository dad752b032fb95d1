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
    "stdlib": "Python",
    "text:corpora/zig": "Zig",
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
    """By head on two texts: below static layouts as cheap, not below heads chosen once."""
    heads, long = read("heads"), read("long")
    tables = summarise(heads).set_index(["corpus", "context", "contender"])
    novels = summarise(long).set_index(["corpus", "context", "contender"])["nll_hard"]
    assert novels.loc["text:corpora/novels100", 2048].idxmin() == "static gl"
    apart = paired(heads, BY_HEAD).set_index(["corpus", "contender"])
    nearest, ours, layouts, once = list[float](), list[str](), list[str](), list[str]()

    def figure(row: pd.Series) -> str:
        return f"{row['nll_hard']:.3f} (SE {row['se']:.3f}) at {row['cost_flops']:.3f}"

    for corpus in ("stdlib", "text:corpora/zig"):
        table = tables.loc[corpus, 2048]
        static = table[table.index.str.startswith("static") & (table["n"] == ALL)]
        (learned,) = static.index[static.index.str.startswith("static heads learned")]
        cheap = static[static["cost_flops"] < table.loc[BY_HEAD, "cost_flops"]]
        assert table.loc[BY_HEAD, "n"] == ALL and len(cheap) == 3 and learned not in cheap.index
        nearest.append(apart.loc[[(corpus, n) for n in cheap.index], "standard errors"].min())
        ours.append(figure(table.loc[BY_HEAD]))
        layouts.append(f"{cheap['nll_hard'].min():.3f}")
        once.append(figure(table.loc[learned]))
    return [
        f"Python {ours[0]} of the FLOPs, Zig {ours[1]}; the best static layouts as "
        f"cheap {layouts[0]} and {layouts[1]} (by {min(nearest):.1f} SE or more)",
        f"heads learned once by the same fit: {once[0]} and {once[1]}",
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
    (card,) = patched["device"].str.extract(r"NVIDIA (\w+)")[0].unique()
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
        f"on an {card}, both in CUDA graphs (Llama's 1B shape, random weights), in {llama[0]:.2f}, "
        f"32,768 tokens in {llama[1]:.2f}; both by torch.compile, too, 8192 in {compiled:.2f}",
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
    """The tables, one a context: every contender with five seeds, by nll, and both its costs.

    A contender whose costs are the same on several texts is one row.
    """
    studies = ("tiny_lm", "recipe", "long", "heads")
    frame = pd.concat([read(name) for name in studies], ignore_index=True)
    frame = frame.drop_duplicates(["contender", "corpus", "context", "seed"]).drop(columns="lr")
    table = summarise(frame)
    table = table[(table["n"] == ALL) & (table["context"] <= 2048)]  # longer ones: the study
    table["costs"] = [f"{p:.3f} | {f:.3f}" for p, f in table[["cost_paper", "cost_flops"]].values]
    lines = []
    for context, group in table.groupby("context"):
        texts = sorted(set(group["corpus"]), key=list(NAMES).index)
        spread = [group[group["corpus"] == text]["se"] for text in texts]
        cells = group.pivot(index=["contender", "costs"], columns="corpus", values="nll_hard")
        names = " | ".join(NAMES[text] for text in texts)
        errors = " | ".join(f"SE {se.min():.3f}-{se.max():.3f}" for se in spread)
        lines += [
            f"| {context} bytes | {names} | paper | FLOPs |",
            "|---|" + "---|" * len(texts) + "---|---|",
            f"| | {errors} | | |",
        ]
        for (contender, costs), found in cells.sort_values(texts).iterrows():
            read_of = ["" if nll != nll else f"{nll:.3f}" for nll in found[texts]]
            lines.append(f"| {short(contender)} | {' | '.join(read_of)} | {costs} |")
        lines.append("")
    return lines[:-1]


def short(contender: str) -> str:
    """A name as the table has it: letters alone are a static layout.

    `gllll+2/4f` has two of four heads of its last layer on f.
    """
    name = re.sub(r"(\w+), (\d) of (\d) heads f", r"\1+\2/\3f", contender)
    name = re.sub(r"(\w+), (\d) of (\d) heads window (\d+)", r"\1+\2/\3w\4", name)
    name = name.replace("static: gated, local, gated, full", "static glgf")
    name = re.sub(r"^static (?=[fgl]+\b)", "", name)
    name = (
        name.replace("static heads", "heads")
        .replace(", straight-through", "")
        .replace(", price 20", "")
    )
    return re.sub(r",? from ([fgl]+)", r" (\1)", name.replace("the hybrid", "glgf"))


def sentences() -> list[str]:
    """Every passage with figures."""
    return [*pretrained(), *scratch(), *clock(), *dial(), *uncertainty()]


def problems(readme: str) -> list[str]:
    """What of `readme` is not in the results."""
    flat = " ".join(readme.split())
    passages = [*sentences(), *filter(None, rows())]
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
