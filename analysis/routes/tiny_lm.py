"""One harness, every contender.

The same backbone, text, tokens and learning rate, each route executed.

`python -m analysis.routes.tiny_lm [--size SIZE] [--corpus NAME] [--context T] [--seeds 5] [--jobs
15] [--only NAME ...] [--out CSV]`

Rows that the results file has already are not run again, so a study that was stopped goes on.
Sizes: `gpu` is the preset `tiny` with 600 steps, 5 seeds for the headline rows and 2 for the
others; `recipe` the same with what was tried beside the recipe; `long` the preset `small` with 1000
steps of 16,384 bytes at the context asked for (2048); `cpu` a smaller one for 2 cores; `toy` for
tests.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from analysis.routes.sweep import sweep
from bayes_router.diagnostics.figures.run import PALETTE
from bayes_router.files import write_text

RESULTS = Path(__file__).parents[1] / "results" / "tiny_lm.csv"
PAPER = ["full", "linear", "local"]  # the paper's experts
OURS = ["full", "gated", "local"]
HYBRID = ["gated", "local", "gated", "full"]


def static(*pattern: str) -> dict[str, Any]:
    """Layers take these experts in turn."""
    return {
        "contender": {"kind": "static", "pattern": pattern},
        "experts": sorted({"full", *pattern}),
    }


def softmax(
    experts: list[str], schedule: dict[str, Any] | None = None, **weights: float
) -> dict[str, Any]:
    """A prior-free softmax router with penalties.

    It starts undecided, or on the layout of its schedule.
    """
    changes = {"prior": {"map": "uniform", "price": 1.0}, "schedule": schedule or {}}
    return {"contender": {"kind": "softmax", "changes": changes, **weights}, "experts": experts}


def dirichlet(
    experts: list[str], prior: dict[str, Any], schedule: dict[str, Any], controller: str = ""
) -> dict[str, Any]:
    """The Dirichlet router, by SVI."""
    changes = {"prior": prior, "schedule": schedule}
    return {
        "contender": {"kind": "svi", "changes": changes, "controller": controller},
        "experts": experts,
    }


def started_on(*pattern: str, price: float = 10.0, **schedule: Any) -> dict[str, Any]:
    """Ours, started on a static hybrid and pressed by a price.

    The prior favours the pattern, then only cost.
    """
    return dirichlet(
        OURS, {"map": "uniform", "price": price}, {"start_experts": pattern, **schedule}
    )


LITERAL = {"total_concentration": 3.0, "temperature": 1.0, "price": 0.0}
LITERAL_SCHEDULE = {"kl_weight": 1.0, "start_total_concentration": 3.0}
SHORT: dict[str, dict[str, Any]] = {
    "full attention": static("full"),
    "local": static("local"),
    "linear": static("linear"),
    "gated linear": static("gated"),
    "static: local, local, local, full": static("local", "local", "local", "full"),
    "static: local, linear": static("local", "linear"),
    "static: local, gated": static("local", "gated"),
    "static: gated, local, gated, full": static(*HYBRID),
    "softmax router": softmax(OURS),
    "softmax router, cost penalty": softmax(OURS, cost=0.12),
    "softmax router, entropy bonus": softmax(OURS, entropy=0.003),
    "softmax router, load balancing": softmax(OURS, balance=0.01),
    "Dirichlet, literal ELBO, paper's experts": dirichlet(PAPER, LITERAL, LITERAL_SCHEDULE),
    "Dirichlet, literal ELBO": dirichlet(OURS, LITERAL, LITERAL_SCHEDULE),
    "ours, paper's experts": dirichlet(PAPER, {}, {}),
    "ours": dirichlet(OURS, {}, {}),
    "ours, from the hybrid": started_on(*HYBRID),
}
LETTERS = {"f": "full", "g": "gated", "l": "local"}
PATTERNS = (
    "f",
    "g",
    "l",
    "gl",
    "gggggf",
    "gggglf",
    "glgglf",
    "lglglf",
    "gllllf",
    "lllllf",
    "llfllf",
    "llllff",
)
"""Static layouts of six layers, one letter a layer: costs 1, .15, .3, .225, .292, .317, .342,
.367, .392, .417, .533, .533."""


def layout(letters: str) -> tuple[str, ...]:
    """Experts of a static layout."""
    return tuple(LETTERS[letter] for letter in letters)


def favouring(*pattern: str) -> list[list[float]]:
    """A prior mean of each layer: 0.6 for the expert of `pattern`, 0.2 for each of the others."""
    return [[0.6 if expert == chosen else 0.2 for expert in OURS] for chosen in pattern]


LATE = {"start_share": 0.98, "anneal_from": 0.5, "anneal_to": 0.8}
"""Half of training on the layout, hardly disturbed; the price comes after."""
LONG: dict[str, dict[str, Any]] = {
    **{f"static {letters}": static(*layout(letters)) for letters in PATTERNS},
    "linear": static("linear"),
    "softmax router": softmax(OURS),
    "softmax router, cost penalty": softmax(OURS, cost=0.03),
    "softmax router, entropy bonus": softmax(OURS, entropy=0.003),
    "softmax router, load balancing": softmax(OURS, balance=0.01),
    "softmax router, from lglglf": softmax(
        OURS, {"start_experts": layout("lglglf"), **LATE}, cost=0.03
    ),
    "Dirichlet, literal ELBO, paper's experts": dirichlet(PAPER, LITERAL, LITERAL_SCHEDULE),
    "Dirichlet, literal ELBO": dirichlet(OURS, LITERAL, LITERAL_SCHEDULE),
    "ours": dirichlet(OURS, {}, {}),
    "ours, from glgglf": started_on(
        *layout("glgglf"), price=20.0, straight_through_from=0.8, **LATE
    ),
    "ours, from glgglf, price 5": started_on(*layout("glgglf"), price=5.0, **LATE),
    "ours, from lglglf": started_on(*layout("lglglf"), **LATE),
    "ours, from gllllf": started_on(*layout("gllllf"), **LATE),
}
RECIPE: dict[str, dict[str, Any]] = {
    "ours": SHORT["ours"],
    **{
        f"ours, price {price}": dirichlet(OURS, {"price": float(price)}, {})
        for price in (12, 15, 20)
    },
    "ours, from full attention, late": started_on("full", **LATE),
    "ours, from the hybrid": SHORT["ours, from the hybrid"],
    "ours, from the hybrid, late": started_on(*HYBRID, **LATE),
    "ours, prior mean by layer": dirichlet(OURS, {"layer_mean": favouring(*HYBRID)}, {}),
    "ours, learned feature map": dirichlet(["full", "mapped", "local"], {}, {}),
    "ours, short convolution": dirichlet(["full", "short_convolution", "local"], {}, {}),
    "ours, short convolution beside gated": dirichlet([*OURS, "short_convolution"], {}, {}),
    "ours, controller sees four tokens": dirichlet(OURS, {}, {}, "convolved"),
    "ours, controller sees the layer below": dirichlet(OURS, {}, {}, "chained"),
    "ours, one route for eight tokens": dirichlet(OURS, {}, {}, "segments"),
}
"""What was tried beside the recipe, at the size of the short study."""
HEADLINE = (
    "full attention",
    "gated linear",
    "static: gated, local, gated, full",
    "softmax router, cost penalty",
    "ours",
    "ours, from the hybrid",
    "local",
    "softmax router",
    "Dirichlet, literal ELBO, paper's experts",
)
TOKENS = 16_384
"""A step of the size `long`."""
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "gpu": {"train": {"steps": 600, "device": "auto"}, "data": {"eval_tokens": 65_536}},
    "recipe": {"train": {"steps": 600, "device": "auto"}, "data": {"eval_tokens": 65_536}},
    "long": {
        "train": {"steps": 1000, "device": "cuda", "warmup": 100, "precision": "bfloat16"},
        "data": {"eval_tokens": 262_144, "context": 2048},
        "model": {"d_model": 256, "num_layers": 6, "num_heads": 4, "window": 64},
    },
    "cpu": {
        "train": {"steps": 300, "device": "cpu", "warmup": 20},
        "data": {"eval_tokens": 16_384, "context": 128},
    },
    "toy": {
        "train": {"steps": 4, "device": "cpu", "batch_size": 2},
        "data": {"eval_tokens": 256, "context": 64},
        "model": {"d_model": 16, "num_heads": 2, "controller_hidden": 4},
    },
}


def contenders(size: str) -> dict[str, dict[str, Any]]:
    """Who takes part in a study of this size."""
    return {"long": LONG, "recipe": RECIPE, "toy": {**SHORT, **LONG, **RECIPE}}.get(size, SHORT)


def plan(
    size: str, corpus: str, seeds: int, names: list[str], context: int = 0, lr: float = 0.0
) -> list[dict[str, Any]]:
    """The jobs of a study: `seeds` of each contender.

    Of the short study's others than the headline at most 2.
    """
    jobs = []
    for seed in range(seeds):
        for name in names:
            if size not in ("long", "recipe") and seed >= 2 and name not in HEADLINE:
                continue
            common = {section: dict(table) for section, table in SIZES[size].items()}
            common.setdefault("model", {})["experts"] = contenders(size)[name]["experts"]
            common["data"] |= {"corpus": corpus} | ({"context": context} if context else {})
            common["train"] |= {"seed": seed, "eval_every": 0}
            if size == "long":
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
        "routing_entropy",
    ]
    groups = frame.groupby(["corpus", "context", "contender"])
    table = groups[columns].mean().join(groups["nll_hard"].agg(n="count", se="sem"))
    return table.reset_index().sort_values(["corpus", "context", "nll_hard"])


def markdown(table: pd.DataFrame) -> str:
    """The tables for a README, one a corpus and context."""
    parts = []
    for (corpus, context), group in table.groupby(["corpus", "context"], sort=False):
        parts += [
            f"{corpus}, context {context}",
            "",
            "| contender | n | nll HARD | SE | nll MEAN | cost (paper) | cost (FLOPs) | route "
            "information |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in group.to_dict("records"):
            parts.append(
                f"| {row['contender']} | {row['n']} | {row['nll_hard']:.4f} | {row['se']:.4f} | "
                f"{row['nll_mean']:.4f} "
                f"| {row['cost_paper']:.3f} | {row['cost_flops']:.3f} | "
                f"{abs(row['route_information']):.3f} |"
            )
        parts.append("")
    return "\n".join(parts)


KINDS = {"static": "s", "softmax router": "^", "Dirichlet": "v", "ours": "o"}
SHOWN = 0.15
"""Nats above the best that a figure shows; who is above is named in the title."""


def draw(table: pd.DataFrame, path: Path) -> None:
    """Nll against executed cost, a panel a corpus and context.

    One point a contender with its standard error.
    """
    panels = list(table.groupby(["corpus", "context"], sort=False))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with sns.axes_style("ticks"), sns.plotting_context("notebook"):
        figure, axes = plt.subplots(
            rows, columns, figsize=(8 * columns, 5.5 * rows), squeeze=False, layout="constrained"
        )
        for ax in axes.flat[len(panels) :]:
            ax.remove()
        for ax, ((corpus, context), group) in zip(axes.flat, panels, strict=False):
            panel(ax, group, f"{corpus.split('/')[-1]}, context {context}")
        sns.despine(figure)
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)


def kind_of(contender: str, routing_entropy: float) -> str:
    """What a point is drawn as: a route without entropy is static, whatever its name."""
    for name in ("softmax", "Dirichlet"):
        if contender.startswith(name):
            return next(kind for kind in KINDS if kind.startswith(name))
    return "static" if routing_entropy < 1e-6 else "ours"


def panel(ax: Axes, group: pd.DataFrame, title: str) -> None:
    """One corpus and context; the line is the front of the static layouts."""
    high = group["nll_hard"] > group["nll_hard"].min() + SHOWN
    above = "; ".join(
        f"{r['contender']} {r['nll_hard']:.2f} at {r['cost_paper']:.2f}"
        for r in group[high].to_dict("records")
    )
    group = group[~high].sort_values("cost_paper")
    kind = pd.Series(map(kind_of, group["contender"], group["routing_entropy"]), group.index)
    static = group[kind == "static"]
    front = static[static["nll_hard"] <= static["nll_hard"].cummin()]
    ax.step(front["cost_paper"], front["nll_hard"], where="post", color=PALETTE[0], alpha=0.4, lw=1)
    for (name, marker), colour in zip(KINDS.items(), PALETTE, strict=False):
        part = group[kind == name]
        if len(part):
            ax.errorbar(
                part["cost_paper"],
                part["nll_hard"],
                part["se"],
                fmt=marker,
                color=colour,
                label=name,
                capsize=3,
            )
    label(ax, group)
    ax.margins(x=MARGIN, y=MARGIN)
    ax.set(
        xlabel="attention cost executed (full = 1, paper's ratios)",
        ylabel="held-out nll, HARD (nats per byte)",
    )
    ax.set_title(title + (f"\nabove: {above}" if above else ""), fontsize=8, wrap=True)
    ax.legend(frameon=False)


MARGIN = 0.18
"""Room beside the points, as a share of their range."""


def label(ax: Axes, group: pd.DataFrame) -> None:
    """Names beside the points, at the first of four corners that is free of names and points.

    A name that finds no room is in the table alone. Positions are shares of the panel.
    """
    at = group[["cost_paper", "nll_hard"]].to_numpy()
    span = (at.max(0) - at.min(0)).clip(min=1e-9)
    places = (at - at.min(0)) / span / (1 + 2 * MARGIN) + MARGIN / (1 + 2 * MARGIN)
    taken = [(x - 0.008, y - 0.012, x + 0.008, y + 0.012) for x, y in places]
    for name, (x, y), point in zip(group["contender"], places, at, strict=True):
        text = (
            name.replace("static ", "")
            .replace("static: ", "")
            .replace("ours, from ", "")
            .replace("ours, ", "")
        )
        width, found = 0.0095 * len(text), []
        for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            left, low = (
                (x + 0.012 if right > 0 else x - 0.012 - width),
                (y + 0.005 if up > 0 else y - 0.035),
            )
            box = (left, low, left + width, low + 0.03)
            meets = sum(
                box[0] < end and box[2] > start and box[1] < top and box[3] > bottom
                for start, bottom, end, top in taken
            )
            found.append(
                (
                    meets,
                    len(found),
                    box,
                    (7 * right, 5 if up > 0 else -12),
                    "left" if right > 0 else "right",
                )
            )
        meets, _, box, offset, side = min(found)
        if meets:
            continue
        taken.append(box)
        ax.annotate(
            text, tuple(point), xytext=offset, textcoords="offset points", fontsize=7, ha=side
        )


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
    draw(table, args.out.with_suffix(".png"))
    print(markdown(table))


if __name__ == "__main__":
    main()
