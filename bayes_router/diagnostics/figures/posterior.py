"""Figures of a fitted posterior. Each function draws on an Axes that it returns."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.axes import Axes
from scipy.stats import binom
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import require
from bayes_router.diagnostics.figures.run import PALETTE, expert_palette
from bayes_router.diagnostics.measures.importance import k_hat_limit

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


def plot_reliability(
    before: pd.DataFrame,
    after: pd.DataFrame | None = None,
    ax: Axes | None = None,
    mended: str = "tempered",
) -> Axes:
    """Observed against stated probability (`reliability`), two standard errors as bars.

    On the diagonal is calibrated. `mended` says what made `after`.
    """
    ax = ax or plt.subplots(figsize=(4.4, 4))[1]
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="calibrated")
    drawn = [(before, "as stated", PALETTE[0], "o", "-")]
    drawn += [] if after is None else [(after, mended, PALETTE[1], "s", "--")]
    for table, label, colour, marker, style in drawn:
        ax.errorbar(
            table["stated"],
            table["observed"],
            yerr=2 * table["error"],
            fmt=marker + style,
            color=colour,
            label=label,
            capsize=2,
        )
        for row in table.itertuples():
            down = -11 if marker == "o" else 7
            ax.annotate(
                f"{row.count}",
                (row.stated, row.observed),
                color=colour,
                xytext=(5, down),
                textcoords="offset points",
                fontsize=7,
            )
    ax.set(
        xlabel="stated probability that the choice is right",
        ylabel="observed share (numbers: choices)",
    )
    ax.set(xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal")
    ax.legend(frameon=False, loc="upper left", fontsize="small")
    return ax


def plot_collapse_over_training(
    training: pd.DataFrame, measure: str = "effective_experts", ax: Axes | None = None
) -> Axes:
    """A figure of `collapse_over_training` by step, a line a layer.

    Filled where a warning of a collapse was raised.
    """
    ax = ax or plt.subplots(figsize=(5, 3.2))[1]
    for layer, part in training.groupby("layer"):
        index = int(str(layer))
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        ax.plot(
            part["step"],
            part[measure],
            STYLES[index % len(STYLES)],
            color=colour,
            label=f"layer {layer}",
        )
        warned = part["collapse"].str.contains("collapse")
        ax.scatter(
            part["step"][~warned],
            part[measure][~warned],
            marker=marker,
            facecolors="white",
            edgecolors=colour,
            zorder=3,
        )
        ax.scatter(
            part["step"][warned], part[measure][warned], marker=marker, color=colour, zorder=3
        )
    ax.set(xlabel="step", ylabel=LABELS.get(measure, measure))
    ax.legend(
        frameon=False, ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    return ax


def plot_k_hat(k_hat: pd.DataFrame, threshold: float | None = None, ax: Axes | None = None) -> Axes:
    """Pareto k-hat against the length of the prefix, a dot a sequence.

    A line goes through the medians; from `k_hat_frame`.
    """
    threshold = k_hat_limit(int(k_hat["draws"].min())) if threshold is None else threshold
    ax = ax or plt.subplots(figsize=(5, 3.2))[1]
    joint = k_hat[k_hat["target"] == "joint"]
    ax.axhline(
        threshold, color="0.5", linestyle="--", linewidth=1, label=f"threshold {threshold:.2g}"
    )
    ax.scatter(
        joint["length"], joint["k_hat"], color=PALETTE[0], s=22, label="a sequence", zorder=3
    )
    ax.plot(joint.groupby("length")["k_hat"].median(), color=PALETTE[1], label="median")
    ax.set_xscale("log", base=2)
    ax.set_xticks(
        sorted(joint["length"].unique()), [str(n) for n in sorted(joint["length"].unique())]
    )
    ax.set(xlabel="prefix (tokens)", ylabel="Pareto k-hat, exact joint")
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_ranks(counts: npt.NDArray[np.int64], ax: Axes | None = None) -> Axes:
    """Histogram of the ranks of simulation-based calibration.

    The band holds 99% of uniform counts.
    """
    ax = ax or plt.subplots(figsize=(4.2, 2.8))[1]
    total, bins = int(counts.sum()), len(counts)
    low, high = (float(binom.ppf(tail, total, 1 / bins)) for tail in (0.005, 0.995))
    ax.bar(np.arange(bins), counts, width=0.9, color=PALETTE[0])
    ax.axhspan(low, high, color=PALETTE[1], alpha=0.35, zorder=3)
    ax.set(xlabel="rank of the truth among posterior draws", ylabel="simulations", xticks=[])
    return ax


def plot_other_text(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """AUROC of the routing entropy and of the nll for each other text (`tell_apart`).

    0.5 is chance.
    """
    ax = ax or plt.subplots(figsize=(5, 2.6))[1]
    rows = np.arange(len(table))
    ax.axvline(0.5, color="0.6", linestyle="--", linewidth=1)
    drawn = (
        ("entropy_of_mean", "routing entropy", "o"),
        ("mutual_information", "mutual information", "^"),
        ("nll", "nll", "s"),
    )
    for (column, label, marker), colour in zip(drawn, PALETTE, strict=False):
        ax.scatter(table[column], rows, color=colour, marker=marker, s=46, label=label, zorder=3)
    ax.set_yticks(rows, table["text"])
    ax.set(
        xlabel="AUROC against held-out text (0.5: chance)",
        ylabel="text",
        xlim=(-0.03, 1.03),
        ylim=(-0.5, len(table) - 0.5),
    )
    ax.grid(axis="y", color="0.9")
    ax.legend(
        frameon=False, fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    return ax
