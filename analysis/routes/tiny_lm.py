"""One harness, every contender.

The same backbone, text, tokens and learning rate, each route executed.

`python -m analysis.routes.tiny_lm [--size SIZE] [--corpus NAME] [--context T] [--seeds 5] [--jobs
15] [--only NAME ...] [--out CSV]`

Rows that the results file has already are not run again, so a study that was stopped goes on;
`--seeds 0` prints what there is.
Sizes: `gpu` is the preset `tiny` with 600 steps, 5 seeds for the headline rows and 2 for the
others; `recipe` the same with what was tried beside the recipe; `long` the preset `small` with 1000
steps of 16,384 bytes at the context asked for (2048); `heads` the same with layouts by head and by
window, at a tenth of full attention's FLOPs; `quoting` the same in small (preset `tiny`, 1200 steps
of 16 x 1024 bytes), for text that quotes itself (`analysis.routes.quotations`); `cpu` a smaller one
for 2 cores; `toy` for tests.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.routes.contenders import Contender
from analysis.routes.layouts import HEADLINE, SIZES, TOKENS, contenders
from analysis.routes.sweep import sweep
from analysis.routes.tiny_lm_figure import draw
from bayes_router.attention.experts.full import FullAttention
from bayes_router.config import config_from_dict
from bayes_router.files import write_text
from bayes_router.presets import preset
from bayes_router.transformer.cost import model_experts

RESULTS = Path(__file__).parents[1] / "results" / "tiny_lm.csv"
FEWEST = 3
"""Seeds of a point in the figures by head; contenders of fewer stand in the table alone."""


def plan(
    size: str, corpus: str, seeds: int, names: list[str], context: int = 0, lr: float = 0.0
) -> list[dict[str, Any]]:
    """The jobs of a study: `seeds` of each contender.

    Of the short study's others than the headline at most 2.
    """
    jobs = []
    for seed in range(seeds):
        for name in names:
            if (
                size not in ("long", "recipe", "heads", "quoting")
                and seed >= 2
                and name not in HEADLINE
            ):
                continue
            common = {section: dict(table) for section, table in SIZES[size].items()}
            common.setdefault("model", {})["experts"] = contenders(size)[name]["experts"]
            common["data"] |= {"corpus": corpus} | ({"context": context} if context else {})
            common["train"] |= {"seed": seed, "eval_every": 0}
            if size in ("long", "heads"):
                common["train"] |= {
                    "batch_size": TOKENS // common["data"]["context"],
                    "lr": 2e-3,
                    "controller_lr": 2e-3,
                }
            if lr:
                common["train"] |= {"lr": lr, "controller_lr": lr}
            jobs.append(
                {"name": name, "contender": contenders(size)[name]["contender"], "common": common}
            )
    return jobs


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """n, mean and standard error of each contender by corpus, best nll first.

    By learning rate too, if there are several.
    """
    if "lr" in frame and frame["lr"].nunique() > 1:
        frame = frame.assign(contender=frame["contender"] + frame["lr"].map(", rate {:g}".format))
    columns = [
        "nll_mean",
        "nll_hard",
        "cost_paper",
        "cost_flops",
        "route_information",
        "context_information",
        "routing_entropy",
    ]
    frame = frame.reindex(columns=[*frame, *(c for c in columns if c not in frame)])
    groups = frame.groupby(["corpus", "context", "contender"])
    table = groups[columns].mean().join(groups["nll_hard"].agg(n="count", se="sem"))
    return table.reset_index().sort_values(["corpus", "context", "nll_hard"])


def paired(frame: pd.DataFrame, against: str) -> pd.DataFrame:
    """Nats by which `against` lies below each other contender, HARD, seeds paired.

    Columns: corpus, context, contender, n, below, se, and how many of them it is.
    """
    rows = []
    for (corpus, context), group in frame.groupby(["corpus", "context"]):
        by_seed = group.pivot(index="seed", columns="contender", values="nll_hard")
        if against not in by_seed:
            continue
        for name in by_seed.columns.drop(against):
            gap = (by_seed[name] - by_seed[against]).dropna()
            mean, se = gap.mean(), gap.sem()
            rows.append((corpus, context, name, len(gap), mean, se, mean / se))
    columns = ["corpus", "context", "contender", "n", "below", "se", "standard errors"]
    return pd.DataFrame(rows, columns=columns)


def rivals(frame: pd.DataFrame, against: str) -> pd.DataFrame:
    """Of each text, the static contenders that a reader would take instead of `against`.

    The best of those whose executed FLOPs are no more, and the cheapest of those whose nll is no
    more, where there is one; of those with as many seeds. Columns as of `paired`, and nll_hard,
    cost_flops, and what it is.
    """
    rows = []
    table = summarise(frame).set_index(["corpus", "context"])
    gaps = paired(frame, against).set_index(["corpus", "context", "contender"])
    for text, group in table.groupby(level=[0, 1]):
        cells = group.set_index("contender")
        if against not in cells.index:
            continue
        ours = cells.loc[against]
        static = cells[cells.index.str.startswith("static") & (cells["n"] >= ours["n"])]
        as_cheap = static[static["cost_flops"] <= ours["cost_flops"] + EQUAL]
        as_good = static[static["nll_hard"] <= ours["nll_hard"]]
        found = {"best as cheap": as_cheap["nll_hard"], "cheapest as good": as_good["cost_flops"]}
        for what, column in found.items():
            if len(column):
                name = column.idxmin()
                row = {"corpus": text[0], "context": text[1], "what": what, "contender": name}
                row |= static.loc[name, ["nll_hard", "cost_flops"]].to_dict()
                rows.append(row | gaps.loc[(*text, name)].to_dict())
    return pd.DataFrame(rows)


EQUAL = 5e-4
"""Costs this near are the same to the digits that are shown."""


def deciding(size: str, name: str) -> float:
    """FLOPs of a contender's controllers in all layers, full attention in every layer = 1.

    The costs of a row are attention's alone. What `freeze` makes static needs no controller.
    """
    (job,) = plan(size, "sotu", 1, [name])
    contender = Contender(**job["contender"])
    if contender.kind == "static":
        return 0.0
    config = contender.config(config_from_dict(job["common"], preset("tiny")))
    model = contender.build_model()(config)
    full = FullAttention(model_experts(model)[0].shape).flops_per_token(config.data.context)
    multiplied = sum(part.numel() for part in model.controller.parameters() if part.dim() == 2)
    return 2 * multiplied / (config.model.num_layers * full)


def markdown(table: pd.DataFrame) -> str:
    """The tables for a README, one a corpus and context."""
    parts = []
    for (corpus, context), group in table.groupby(["corpus", "context"], sort=False):
        parts += [
            f"{corpus}, context {context}",
            "",
            "| contender | n | nll HARD | SE | nll MEAN | cost (paper) | cost (FLOPs) | route "
            "information | of context |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in group.to_dict("records"):
            parts.append(
                f"| {row['contender']} | {row['n']} | {row['nll_hard']:.4f} | {row['se']:.4f} | "
                f"{row['nll_mean']:.4f} "
                f"| {row['cost_paper']:.3f} | {row['cost_flops']:.3f} | "
                f"{abs(row['route_information']):.3f} | {_known(row['context_information'])} |"
            )
        parts.append("")
    return "\n".join(parts)


def _known(nats: float) -> str:
    """Rows of before did not read it."""
    return "not read" if nats != nats else f"{abs(nats):.3f}"


def main() -> None:
    """Run what is missing, write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument(
        "--context", type=int, default=0, help="tokens of a sequence; default: that of the size"
    )
    parser.add_argument(
        "--lr", type=float, default=0.0, help="peak learning rate; default: that of the size"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="default: all")
    parser.add_argument(
        "--against", metavar="NAME", help="print how far it is below the others, seeds paired"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    known = contenders(args.size)
    unknown = set(args.only) - set(known)
    if unknown:
        parser.error(
            f"--only: expected names among {', '.join(known)}; got {', '.join(sorted(unknown))}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    jobs = plan(args.size, args.corpus, args.seeds, args.only or list(known), args.context, args.lr)
    frame = sweep(jobs, args.out, args.jobs)
    table = summarise(frame)
    write_text(args.out.with_suffix(".md"), markdown(table))
    cheap = args.size in ("heads", "quoting")  # whose layouts the paper's units hardly tell apart
    drawn = table[table["n"] >= FEWEST] if cheap else table  # seeds differ more than contenders
    draw(drawn, args.out.with_suffix(".png"), "cost_flops" if cheap else "cost_paper")
    print(markdown(table))
    if args.against:
        print(paired(frame, args.against).round(4).to_string(index=False))
        print(rivals(frame, args.against).round(4).to_string(index=False))
        print(f"controllers of {args.against}: {deciding(args.size, args.against):.4f} beside it")


if __name__ == "__main__":
    main()
