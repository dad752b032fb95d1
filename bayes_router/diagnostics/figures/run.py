"""Figures. Each function draws on an Axes that it returns.

Colours stay apart in greyscale and for the colour-blind.
"""

import os
import re
import sys
from pathlib import Path

import matplotlib

if "MPLBACKEND" not in os.environ and "matplotlib.pyplot" not in sys.modules:
    # a command needs no window; a notebook or a user that chose a backend keeps it
    matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from bayes_router.config import load_config
from bayes_router.files import CONFIG, METRICS, require_file

# dark blue, orange, light green, purple, yellow: of lightness 24, 54, 80, 37 and 89 of 100
PALETTE = ("#0b3c5d", "#c8641b", "#8fd3b6", "#7b3f86", "#eee08a")


def expert_palette(experts: list[str]) -> dict[str, str]:
    """The colour of each expert, the same in every figure."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(experts)}


def plot_losses(metrics: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Training nll and held-out nll of each mode over steps."""
    ax = ax or plt.subplots(figsize=(6, 4))[1]
    ax.plot(metrics["step"], metrics["nll"], color="0.7", linewidth=1, label="training, SAMPLE")
    held_out = metrics.dropna(subset=["valid_nll_hard"])
    for mode, style, marker in (("mean", "--", "o"), ("sample", ":", "^"), ("hard", "-", "s")):
        ax.plot(
            held_out["step"],
            held_out[f"valid_nll_{mode}"],
            style,
            marker=marker,
            markersize=4,
            label=f"held out, {mode.upper()}",
        )
    top = metrics["nll"].iloc[len(metrics) // 10 :].max()
    ax.set(xlabel="step", ylabel="nll (nats per token)", ylim=(None, top))
    ax.legend(frameon=False)
    return ax


def plot_load(
    metrics: pd.DataFrame, experts: list[str], layer: int, ax: Axes | None = None
) -> Axes:
    """Share of held-out tokens on each expert of a layer over steps (HARD), stacked."""
    ax = ax or plt.subplots(figsize=(4, 3))[1]
    held_out = metrics.dropna(subset=["valid_nll_hard"])
    shares = [held_out[f"load_{layer}_{name}"] for name in experts]
    colours = expert_palette(experts)
    ax.stackplot(
        held_out["step"],
        shares,
        labels=experts,
        colors=[colours[name] for name in experts],
        edgecolor="white",
    )
    ax.set(xlabel="step", ylabel="share of tokens", title=f"layer {layer}", ylim=(0, 1))
    return ax


def plot_cost(metrics: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Held-out nll against executed attention cost, one point an evaluation, joined in time."""
    ax = ax or plt.subplots(figsize=(5, 4))[1]
    held_out = metrics.dropna(subset=["valid_nll_hard"])
    ax.plot(held_out["cost_paper"], held_out["valid_nll_hard"], color="0.6", linewidth=1, zorder=1)
    points = ax.scatter(
        held_out["cost_paper"],
        held_out["valid_nll_hard"],
        c=held_out["step"],
        cmap="viridis",
        zorder=2,
    )
    ax.figure.colorbar(points, ax=ax, label="step")
    ax.set(
        xlabel="attention cost executed (full = 1, paper's ratios)",
        ylabel="held-out nll, HARD (nats per token)",
    )
    return ax


TERMS = {
    "kl": ("KL to the prior", "nats per token"),
    "elbo": ("ELBO", "nats per token"),
    "cost": ("executed cost", "full = 1"),
    "price": ("price", "nats per unit of cost"),
}
"""What a fit moves beside its loss, and in which unit."""


def plot_term(metrics: pd.DataFrame, term: str, ax: Axes | None = None) -> Axes:
    """One of `TERMS` over steps: training in grey, held out in black with points."""
    ax = ax or plt.subplots(figsize=(4, 3))[1]
    title, unit = TERMS[term]
    held_out = metrics.dropna(subset=["valid_nll_hard"])
    if term in metrics:
        ax.plot(metrics["step"], metrics[term], color="0.55", linewidth=1, label="training")
    if term == "kl":
        of_layers = [name for name in map(str, held_out) if re.fullmatch(r"kl_\d+", name)]
        values = {"held out": (held_out[of_layers].sum(axis=1), "-", "o")}
    elif term == "elbo":
        values = {"held out": (held_out["valid_elbo"], "-", "o")}
    elif term == "cost":
        names = {"paper": ("-", "o"), "flops": ("--", "s")}
        values = {
            f"held out, {name}": (held_out[f"cost_{name}"], *style)
            for name, style in names.items()
            if f"cost_{name}" in held_out
        }
    else:
        values = {}
    for label, (y, style, marker) in values.items():
        ax.plot(held_out["step"], y, style, marker=marker, color="0.1", markersize=4, label=label)
    ax.set(xlabel="step", ylabel=unit, title=title)
    if term == "elbo":  # the first steps would flatten the rest
        ax.set_ylim(bottom=float(metrics["elbo"].iloc[len(metrics) // 10 :].min()))
    ax.legend(frameon=False)
    return ax


def draw_run(run: Path) -> list[Path]:
    """Write the figures of a run to its folder `figures`; returns their paths."""
    metrics = pd.read_csv(require_file(run, METRICS))
    model = load_config(require_file(run, CONFIG)).model
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    with sns.axes_style("ticks"), sns.plotting_context("notebook"):
        paths = [
            _save(plot_losses(metrics), folder / "losses.png"),
            _save(plot_cost(metrics), folder / "cost_nll.png"),
        ]
        terms = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")[1]
        for term, ax in zip(TERMS, terms.flat, strict=True):
            plot_term(metrics, term, ax)
        paths.append(_save(terms.flat[0], folder / "terms.png"))
        columns = min(4, model.num_layers)
        rows = -(-model.num_layers // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(3 * columns, 2.6 * rows), squeeze=False, sharey=True
        )
        for layer, ax in enumerate(axes.flat):
            if layer < model.num_layers:
                plot_load(metrics, list(model.experts), layer, ax)
            else:
                ax.set_axis_off()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="upper center",
            ncol=len(labels),
            frameon=False,
            bbox_to_anchor=(0.5, 1.08),
        )
        paths.append(_save(axes.flat[0], folder / "load.png"))
    return paths


def _save(ax: Axes, path: Path) -> Path:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
