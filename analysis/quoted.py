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

from analysis.pretrained.table import below, losses
from analysis.routes.tiny_lm import summarise

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
    """Routes by query head against the best static choice, at a budget of 0.3."""
    frame = read("pretrained")
    table = losses(frame[(frame["context"] == 8192) & (frame["window"] == 1024)])
    cells = table[table["budget"] == 0.3].set_index(["contender", "text"])
    ours, rival = cells.loc["token x query head"], cells.loc["static, query heads"]
    static = cells[cells.index.get_level_values(0).str.startswith(("static", "one window"))]
    assert static.groupby(level=0)["lost"].mean().idxmin() == "static, query heads"
    paired = below(frame[frame["context"] == 8192], "static, query heads", 1024)
    paired = paired[paired["budget"] == 0.3].set_index("text")
    shown = paired.index[paired["below"] > 2 * paired["se"]]
    assert sorted(shown) == ["novels", "wikitext"]

    def pair(cell: pd.DataFrame) -> str:
        novels, wiki = cell.loc["novels"], cell.loc["wikitext"]
        return (
            f"{novels['lost']:.2f}% of perplexity on novels and {wiki['lost']:.2f}% on WikiText "
            f"(SE {novels['se']:.2f} and {wiki['se']:.2f}, {novels['pieces']:.0f} texts) at an "
            f"executed cost "
            f"of {novels['cost']:.3f}"
        )

    return [
        f"its {ours['seeds'].max():.0f} seeds lose {pair(ours)}; the best static rival, a choice "
        f"of query heads fitted "
        f"alike ({rival['seeds'].max():.0f} seed), {pair(rival)}"
    ]


def higher_rate() -> list[str]:
    """Where the static choice is better."""
    table = losses(read("pretrained_rate"))
    table = table[(table["context"] == 8192) & (table["window"] == 1024) & (table["budget"] == 0.5)]
    cells = table.set_index(["contender", "text"])
    static, ours = (
        cells.loc[(name, "novels")] for name in ("static, query heads", "token x query head")
    )

    def figures(cell: pd.Series) -> str:
        return (
            f"{cell['lost']:.2f}% (SE {cell['se']:.2f}, {cell['seeds']:.0f} seeds) at "
            f"{cell['cost']:.3f}"
        )

    return [f"the static choice is better on novels, {figures(static)} against {figures(ours)}"]


def scratch() -> list[str]:
    """Started on a layout, against it."""
    long = summarise(read("long")).set_index(["corpus", "context", "contender"]).loc["stdlib", 2048]
    static = long[long.index.str.startswith("static") & (long["n"] == ALL)]
    best, ours = static.iloc[0], long.loc["ours, from gllllf"]
    small = summarise(read("tiny_lm")).set_index("contender")
    layout, default = small.loc["static: gated, local, gated, full"], small.loc["ours"]
    assert static.index[0] == "static gllllf"
    return [
        f"({ours['n']:.0f} seeds), ours has {ours['nll_hard']:.3f} nats per byte (SE "
        f"{ours['se']:.3f}) at an executed cost "
        f"of {ours['cost_paper']:.3f}; the best static rival, the layout it started on, "
        f"{best['nll_hard']:.3f} "
        f"({best['se']:.3f}) at {best['cost_paper']:.3f}",
        f"{default['nll_hard']:.3f} ({default['se']:.3f}) at {default['cost_paper']:.3f}, and the "
        f"best static rival is "
        f"better, {layout['nll_hard']:.3f} ({layout['se']:.3f}) at {layout['cost_paper']:.3f}",
    ]


def clock() -> list[str]:
    """Where time is saved, and where not."""
    cpu = read("patch_speed_256_cpu").set_index(["what", "context", "batch", "contender"])
    read_, decode = (
        cpu.loc[key]
        for key in (("prefill", 8192, 1, "routed 0.5"), ("decode", 8000, 4, "routed 0.5"))
    )
    short, middle = (cpu.loc[("prefill", length, 1, "routed 0.5")] for length in (2048, 4096))
    quality = read("patch_smollm_256")
    novels = quality[(quality["text"] == "novels")].set_index(["contender", "budget"])
    original = novels.loc[("original", 1.0), "perplexity"]
    at_half = novels.xs(0.5, level="budget")
    static = at_half.drop(index="routed")
    best = static.loc[static["perplexity"].idxmin()]
    assert static["perplexity"].idxmin() == "one window"

    def lost(perplexity: float) -> str:
        return f"{100 * (perplexity / original - 1):.2f}%"

    gpu = read("speed_model_cuda").set_index(["what", "B", "T", "variant"])["speedup"]
    x = {length: gpu[("prefill", 1, length, "routed")] for length in (4096, 16384, 32768)}
    plain = [gpu[("decode", b, t, "routed")] for b in (1, 16) for t in x]
    graph = [gpu[("decode", 16, t, "graph routed")] for t in x]
    single = [gpu[("decode", 1, t, "graph routed")] for t in x]
    patched = read("patched_cuda")
    patched = patched[(patched["what"] == "prefill") & (patched["unit"] == "layer")]
    over = patched.groupby(["shape", "context", "contender"])["ratio"].mean()
    llama = [over[("llama-1b, 8 layers", n, "routed 0.1, graph")] for n in (8192, 32768)]
    eager = over[("smollm2-135m, 30 layers", 8192, "routed 0.1")]
    return [
        f"reads 8192 tokens in {read_['ratio']:.2f} of the unpatched model's time (executed cost "
        f"{read_['cost']:.3f}) "
        f"and decodes a batch of four in {decode['ratio']:.2f} ({decode['cost']:.3f}), but loses "
        f"{lost(at_half.loc['routed', 'perplexity'])} of perplexity on novels (at "
        f"{at_half.loc['routed', 'cost']:.3f}), "
        f"more than its best static rival, one window for all, {lost(best['perplexity'])} (at "
        f"{best['cost']:.3f})",
        f"a patched model reads 8192 tokens in {read_['ratio']:.2f} of the time, 4096 in "
        f"{middle['ratio']:.2f}, 2048 in "
        f"{short['ratio']:.2f}",
        f"a small fitted model reads 16,384 and 32,768 tokens {x[16384]:.1f}x and {x[32768]:.1f}x "
        f"as fast, and 4096 "
        f"only {x[4096]:.2f}x; it decodes a batch of 16 {min(graph):.1f}x to {max(graph):.1f}x as "
        f"fast in CUDA graphs",
        f"one row only {min(single):.2f}x to {max(single):.2f}x, and without graphs all "
        f"{min(plain):.2f}x to {max(plain):.2f}x",
        f"in CUDA graphs, one token in ten on full, a patched Llama of 1B shape (random weights) "
        f"reads 8192 tokens in {llama[0]:.2f} of the unpatched model's time, 32,768 in "
        f"{llama[1]:.2f}",
        f"patched SmolLM2's shape takes {eager:.2f} of the time at 8192 tokens",
    ]


def dial() -> list[str]:
    """A trained model at other budgets than its own."""
    curve = read("dial").groupby("budget")["nll_hard"].mean()
    return [
        f"from {curve.min():.2f} nats per byte at a budget of {curve.idxmin():.2f} to "
        f"{curve[1.0]:.2f} at 1.0"
    ]


def uncertainty() -> list[str]:
    """What evidence, risk and confidence are worth on one run, with intervals over windows."""
    evidence = read("uncertainty_evidence").set_index(["text", "score"])
    risk = (
        read("uncertainty_risk").set_index(["text", "figure"]).loc[("held out", "rank correlation")]
    )
    confidence = read("uncertainty_confidence").set_index(["stated by", "figure"])
    recent, one = evidence.loc[("code", "recent")], evidence.loc[("code", "token")]
    right, auroc = confidence.loc[("posterior", "right")], confidence.loc[("confidence", "auroc")]
    says, better = (confidence.loc[(by, "stated"), "value"] for by in ("posterior", "confidence"))
    return [
        f"AUROC {recent['auroc']:.3f} ({recent['low']:.3f} to {recent['high']:.3f}, n = "
        f"{recent['n']:,.0f} bytes), "
        f"but a single byte hardly, {one['auroc']:.3f}",
        f"rank correlation {risk['value']:.3f} ({risk['low']:.3f} to {risk['high']:.3f}, n = "
        f"{risk['n']:,.0f})",
        f"it says {says:.3f}, and {right['value']:.3f} are ({right['low']:.3f} to "
        f"{right['high']:.3f}, n = {right['n']:,.0f})",
        f"says {better:.3f}, but does not pick the mistakes: AUROC {auroc['value']:.3f} "
        f"({auroc['low']:.3f} to "
        f"{auroc['high']:.3f})",
    ]


def rows() -> list[str]:
    """The table: every contender with five seeds, best first in each text."""
    frame = pd.concat([read("tiny_lm"), read("recipe"), read("long")], ignore_index=True)
    frame = frame.drop_duplicates(["contender", "corpus", "context", "seed"]).drop(columns="lr")
    lines = [
        "| text, bytes | contender | nll HARD | SE | nll MEAN | cost, paper | cost, FLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summarise(frame).to_dict("records"):
        if row["n"] == ALL:
            figures = f"{row['nll_hard']:.3f} | {row['se']:.3f} | {row['nll_mean']:.3f}"
            costs = f"{row['cost_paper']:.3f} | {row['cost_flops']:.3f}"
            lines.append(
                f"| {NAMES[row['corpus']]}, {row['context']} | {row['contender']} | {figures} | "
                f"{costs} |"
            )
    return lines


def sentences() -> list[str]:
    """Every passage with figures."""
    return [*pretrained(), *higher_rate(), *scratch(), *clock(), *dial(), *uncertainty()]


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
    figures = len(re.findall(r"\d[\d.,]*", readme))
    print(
        f"README: {words(readme)} words of prose, {len(readme.split())} in all, {figures} numbers"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
