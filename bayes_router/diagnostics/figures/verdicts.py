"""Figures of what a verdict is read from. Each function draws on an Axes that it returns."""

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import binom

from bayes_router.diagnostics.figures.posterior import LABELS, MARKERS, STYLES
from bayes_router.diagnostics.figures.run import PALETTE
from bayes_router.diagnostics.measures.importance import k_hat_limit


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
