"""Figures of a fitted posterior. Each function draws on an Axes that it returns."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import require
from bayes_router.diagnostics.figures.run import PALETTE, expert_palette

CORNERS = np.array([[0.5, 3**0.5 / 2], [0.0, 0.0], [1.0, 0.0]])  # top, left, right
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
LABELS = {
    "entropy_of_mean": "entropy of the mean route (nats)",
    "expected_entropy": "expected entropy of the route (nats)",
    "mutual_information": "mutual information (nats)",
    "probability_right": "probability that the argmax is right",
    "total_concentration": "total concentration",
    "cost": "attention cost of the mean route (full = 1)",
    "effective_experts": "effective number of experts",
    "route_information": "route information (nats)",
    "context_information": "of context (nats)",
    "kl": "KL to the prior (nats per token)",
    "kl_untilted": "KL to the prior without its tilt (nats per token)",
    "largest_load": "largest share of tokens",
}


def plot_simplex_density(
    concentration: Tensor, prior: Tensor, experts: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Where the routes of many tokens lie.

    Draws of their posteriors as log density, draws of the prior as open circles.

    Args:
        concentration: of N tokens in one layer, [N, 3].
        prior: draws [S, 3].
        experts: three names; ValueError for another number.
        ax: to draw on.
    """
    require(
        len(experts) == 3,
        "experts",
        "three, for a triangle",
        tuple(experts),
        "use plot_load_by_layer",
    )
    ax = ax or plt.subplots(figsize=(4.6, 4))[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = (
            Dirichlet(concentration.detach().double().cpu(), validate_args=False)
            .sample(torch.Size([4]))
            .flatten(0, 1)
        )
    x, y = (draws.numpy() @ CORNERS).T
    cells = ax.hexbin(
        x,
        y,
        gridsize=28,
        bins="log",
        cmap="cividis_r",
        mincnt=1,
        extent=(0, 1, 0, 0.9),
        linewidths=0.1,
    )
    ax.figure.colorbar(cells, ax=ax, label="draws of token posteriors", shrink=0.7)
    px, py = (prior[:250].double().cpu().numpy() @ CORNERS).T
    ax.scatter(
        px,
        py,
        s=16,
        facecolors="none",
        edgecolors="#b0413e",
        linewidths=0.8,
        alpha=0.6,
        label="draws of the prior",
        zorder=3,
    )
    ax.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color="0.3", linewidth=1)
    for name, (cx, cy), place in zip(
        experts, CORNERS, (("center", "bottom"), ("right", "top"), ("left", "top")), strict=True
    ):
        ax.text(cx, cy + (0.03 if place[1] == "bottom" else -0.03), name, ha=place[0], va=place[1])
    ax.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.0), aspect="equal")
    ax.set_axis_off()
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.06), fontsize="small")
    return ax


def plot_load_by_layer(
    layers: pd.DataFrame, experts: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Share of tokens on each expert in each layer, stacked and hatched.

    From `CollapseSummary.layers`.
    """
    ax = ax or plt.subplots(figsize=(5, 3))[1]
    left = np.zeros(len(layers))
    for (name, colour), hatch in zip(
        expert_palette(list(experts)).items(), ("", "//", "..", "xx", "--"), strict=False
    ):
        share = layers[f"load {name}"].to_numpy()
        ax.barh(
            layers.index.astype(str),
            share,
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=name,
        )
        for row, (start, width) in enumerate(zip(left, share, strict=True)):
            if width > 0.07:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
                ax.text(
                    start + width / 2,
                    row,
                    f"{width:.0%}",
                    ha="center",
                    va="center",
                    fontsize="small",
                    bbox=box,
                )
        left += share
    ax.set(xlabel="share of tokens (HARD)", ylabel="layer", xlim=(0, 1))
    ax.invert_yaxis()
    ax.legend(frameon=False, ncols=len(experts), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


def plot_units(units: pd.DataFrame, column: str, label: str, ax: Axes | None = None) -> Axes:
    """A column of `CollapseSummary.units` as a heat map, layer by unit.

    Which heads look far, and which one token moves.
    """
    table = units.pivot(index="layer", columns="unit", values=column)
    ax = (
        ax
        or plt.subplots(
            figsize=(max(3.0, 0.35 * table.shape[1] + 1.5), max(2.5, 0.25 * table.shape[0] + 1))
        )[1]
    )
    top = 1.0 if column.startswith("load ") else None
    image = ax.imshow(table.to_numpy(), aspect="auto", vmin=0, vmax=top, cmap="viridis")
    ax.set(xlabel="unit (key head or query head)", ylabel="layer")
    ax.set_xticks(range(table.shape[1]), [str(unit) for unit in table.columns])
    ax.set_yticks(range(table.shape[0]), [str(layer) for layer in table.index])
    plt.colorbar(image, ax=ax, label=label)
    return ax


def plot_by_position(
    positions: pd.DataFrame, measure: str = "entropy_of_mean", ax: Axes | None = None
) -> Axes:
    """A measure by position in the window, a line a layer, in about 64 bins.

    From `UncertaintySummary.positions`.
    """
    ax = ax or plt.subplots(figsize=(5.5, 3.4))[1]
    width = max(1, (positions["position"].max() + 1) // 64)
    for layer, part in positions.groupby("layer"):
        line = part.groupby(part["position"] // width)[measure].mean()
        index = int(str(layer))
        style, colour = STYLES[index % len(STYLES)], PALETTE[index % len(PALETTE)]
        ax.plot(
            line.index * width + (width - 1) / 2,
            line,
            style,
            color=colour,
            label=f"layer {layer}",
            linewidth=1.6,
        )
    ax.set(
        xlabel="position in the window (tokens)",
        ylabel=LABELS.get(measure, measure),
        ylim=(0, None),
    )
    ax.legend(
        frameon=False, ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    return ax


def plot_by_kind(
    kinds: pd.DataFrame, measure: str = "entropy_of_mean", ax: Axes | None = None
) -> Axes:
    """A measure by kind of token, a marker a layer, the most frequent kind first.

    From `UncertaintySummary.kinds_frame`.
    """
    ax = ax or plt.subplots(figsize=(5.5, 3.4))[1]
    shares = kinds.drop_duplicates("kind").sort_values("share", ascending=False)
    order = {kind: row for row, kind in enumerate(shares["kind"])}
    for layer, part in kinds.groupby("layer"):
        index = int(str(layer))
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        rows = part["kind"].map(order) + (index - (kinds["layer"].max()) / 2) * 0.12
        ax.scatter(
            part[measure], rows, color=colour, marker=marker, s=34, label=f"layer {layer}", zorder=3
        )
    labels = [f"{row.kind} ({row.share:.1%})" for row in shares.itertuples()]
    ax.set_yticks(range(len(order)), labels)
    ax.grid(axis="y", color="0.9")
    ax.set(xlabel=LABELS.get(measure, measure), ylabel="kind of token (share)", xlim=(0, None))
    ax.invert_yaxis()
    ax.legend(
        frameon=False, fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    return ax
