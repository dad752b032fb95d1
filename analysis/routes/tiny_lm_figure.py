"""The figure of `analysis.routes.tiny_lm`: nats against executed cost, a panel a text."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from bayes_router.diagnostics.figures.run import PALETTE

KINDS = {"static": "s", "softmax router": "^", "Dirichlet": "v", "ours": "o"}
SHOWN = {"cost_paper": 0.15, "cost_flops": 0.25}
"""Nats above the best that a figure shows; who is above is named in the title."""


UNITS = {"cost_paper": "paper's ratios", "cost_flops": "FLOPs"}


def draw(table: pd.DataFrame, path: Path, cost: str = "cost_paper") -> None:
    """Nll against executed cost, in either unit, a panel a corpus and context.

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
            panel(ax, group, f"{corpus.split('/')[-1]}, context {context}", cost)
        sns.despine(figure)
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)


def kind_of(contender: str, routing_entropy: float) -> str:
    """What a point is drawn as: a route without entropy is static, whatever its name."""
    for name in ("softmax", "Dirichlet"):
        if contender.startswith(name):
            return next(kind for kind in KINDS if kind.startswith(name))
    return "static" if routing_entropy < 1e-6 or contender.startswith("static") else "ours"


def panel(ax: Axes, group: pd.DataFrame, title: str, cost: str) -> None:
    """One corpus and context; the line is the front of the static layouts."""
    high = group["nll_hard"] > group["nll_hard"].min() + SHOWN[cost]
    above = "; ".join(
        f"{r['contender']} {r['nll_hard']:.2f} at {r[cost]:.2f}"
        for r in group[high].to_dict("records")
    )
    group = group[~high].sort_values(cost)
    kind = pd.Series(map(kind_of, group["contender"], group["routing_entropy"]), group.index)
    static = group[kind == "static"]
    front = static[static["nll_hard"] <= static["nll_hard"].cummin()]
    ax.step(front[cost], front["nll_hard"], where="post", color=PALETTE[0], alpha=0.4, lw=1)
    for (name, marker), colour in zip(KINDS.items(), PALETTE, strict=False):
        part = group[kind == name]
        if len(part):
            ax.errorbar(
                part[cost],
                part["nll_hard"],
                part["se"],
                fmt=marker,
                color=colour,
                label=name,
                capsize=3,
            )
    label(ax, group, cost)
    ax.margins(x=MARGIN, y=MARGIN)
    ax.set(
        xlabel=f"attention cost executed (full = 1, {UNITS[cost]})",
        ylabel="held-out nll, HARD (nats per byte)",
    )
    ax.set_title(title + (f"\nabove: {above}" if above else ""), fontsize=8, wrap=True)
    ax.legend(frameon=False)


MARGIN = 0.18
"""Room beside the points, as a share of their range."""


def label(ax: Axes, group: pd.DataFrame, cost: str) -> None:
    """Names beside the points, at the first of four corners that is free of names and points.

    A name that finds no room is in the table alone. Positions are shares of the panel.
    """
    at = group[[cost, "nll_hard"]].to_numpy()
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
