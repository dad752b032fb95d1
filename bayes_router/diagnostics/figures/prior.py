"""Figures of a prior before and after text.

Its draws, the cost and entropy that they imply, and sweeps over its settings.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bayes_router.checks import require
from bayes_router.diagnostics.figures.run import PALETTE, expert_palette
from bayes_router.routing.posterior import categorical_entropy

SHOWN = 1500
LABELS = {
    "prior.total_concentration": "total concentration",
    "schedule.kl_weight": "KL weight",
    "prior.temperature": "temperature",
    "posterior_cost": "attention cost (full = 1)",
    "nll": "held-out nll (nats per token)",
    "route_information": "route information (nats)",
}


def plot_simplex(draws: Tensor, experts: Sequence[str], ax: Axes | None = None) -> Axes:
    """Routes [N, E] on the simplex.

    A triangle for three experts, one strip an expert for any other number.
    """
    ax = ax or plt.subplots(figsize=(4, 4))[1]
    shown, mean = draws[:SHOWN].double().numpy(), draws.double().mean(0).tolist()
    names = [f"{name}\nmean {share:.1%}" for name, share in zip(experts, mean, strict=True)]
    if len(experts) != 3:
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, shown.shape)
        for e, colour in enumerate(expert_palette(list(experts)).values()):
            ax.scatter(shown[:, e], e + jitter[:, e], s=5, alpha=0.3, color=colour, linewidth=0)
        ax.set(yticks=range(len(experts)), yticklabels=names, xlabel="weight", xlim=(-0.02, 1.02))
        return ax
    corners = np.array([[0.5, 3**0.5 / 2], [0.0, 0.0], [1.0, 0.0]])
    # nearly one-hot draws would hide each other: a little noise shows how many lie in a corner
    points = shown @ corners + np.random.default_rng(0).normal(0, 0.012, (len(shown), 2))
    ax.plot(*corners[[0, 1, 2, 0]].T, color="0.6", linewidth=1)
    ax.scatter(points[:, 0], points[:, 1], s=5, alpha=0.25, color=PALETTE[0], linewidth=0)
    for name, (x, y), below in zip(names, corners, (False, True, True), strict=True):
        ax.annotate(
            name, (x, y + (-0.06 if below else 0.05)), ha="center", va="top" if below else "bottom"
        )
    ax.set(aspect="equal", xlim=(-0.2, 1.2), ylim=(-0.3, 1.15))
    ax.set_axis_off()
    return ax


def plot_implied(
    values: Tensor, label: str, ax: Axes | None = None, target: float | None = None
) -> Axes:
    """Histogram of what each draw implies ([N]), its mean, and the target if there is one."""
    ax = ax or plt.subplots(figsize=(4, 3))[1]
    array: npt.NDArray[np.float64] = values.double().numpy()
    ax.hist(
        array, bins=50, weights=np.full(len(array), 100 / len(array)), color=PALETTE[2], linewidth=0
    )
    ax.axvline(array.mean(), color=PALETTE[0], label=f"mean {array.mean():.3f}")
    if target is not None:
        ax.axvline(
            target, color=PALETTE[1], linestyle=":", linewidth=3, label=f"target {target:.3f}"
        )
    ax.set(xlabel=label, ylabel="draws (%)")
    ax.legend(frameon=False)
    return ax


def draw_prior(
    draws: Tensor,
    cost_ratio: Tensor,
    experts: Sequence[str],
    path: Path,
    target_cost: float | None = None,
    target_entropy: float | None = None,
) -> Path:
    """Write one figure: draws [N, E] of the prior on the simplex.

    Beside them the cost and entropy that each implies.
    """
    with sns.axes_style("ticks"), sns.plotting_context("notebook"):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
        plot_simplex(draws, experts, axes[0])
        plot_implied(
            draws @ cost_ratio.to(draws),
            "attention cost of a draw (full = 1)",
            axes[1],
            target_cost,
        )
        plot_implied(
            categorical_entropy(draws), "entropy of a draw (nats)", axes[2], target_entropy
        )
        sns.despine(figure)
    return _write(figure, path)


def plot_sweep(frame: pd.DataFrame, knob: str, quantity: str, ax: Axes | None = None) -> Axes:
    """How one quantity of `sweep_prior` moves with one knob.

    Mean over seeds, bars of one standard error.

    `quantity` is "posterior_cost" (with the executed and the prior's cost beside it), "nll"
    (executed and mean) or "route_information" (and what of it is of the context).
    """
    ax = ax or plt.subplots(figsize=(4, 3))[1]
    lines = {
        "posterior_cost": {
            "posterior": "posterior_cost",
            "executed": "executed_cost",
            "prior": "prior_cost",
        },
        "nll": {"HARD": "nll_hard", "MEAN": "nll_mean"},
        "route_information": {"in all": "route_information", "of context": "context_information"},
    }
    require(quantity in lines, "quantity", f"one of {', '.join(lines)}", quantity)
    grouped = frame.groupby(knob)
    for (label, column), colour, style in zip(
        lines[quantity].items(), PALETTE, ("o-", "s--", "^:"), strict=False
    ):
        mean, error = grouped[column].mean(), grouped[column].sem().fillna(0.0)
        ax.errorbar(mean.index, mean, error, fmt=style, color=colour, capsize=3, label=label)
    ax.set(xscale="log", xlabel=LABELS.get(knob, knob), ylabel=LABELS[quantity])
    if len(lines[quantity]) > 1:
        ax.legend(frameon=False)
    return ax


def draw_sweep(frame: pd.DataFrame, centre: dict[str, float], path: Path) -> Path:
    """Write one figure: a column for each knob of a one-at-a-time sweep, a row for each quantity.

    `centre` is marked.
    """
    quantities = ("posterior_cost", "nll", "route_information")
    with sns.axes_style("ticks"), sns.plotting_context("notebook"):
        size = (4.2 * len(centre), 3.2 * len(quantities))
        figure, axes = plt.subplots(
            len(quantities),
            len(centre),
            figsize=size,
            layout="constrained",
            squeeze=False,
            sharex="col",
            sharey="row",
        )
        for column, knob in enumerate(centre):
            others = [name for name in centre if name != knob]
            moved = frame[(frame[others] == pd.Series(centre)[others]).all(axis=1)]
            for row, quantity in enumerate(quantities):
                ax = plot_sweep(moved, knob, quantity, axes[row, column])
                ax.axvline(centre[knob], color="0.8", zorder=0)
                if row < len(quantities) - 1:
                    ax.set_xlabel("")
                if column:
                    ax.set_ylabel("")
                    legend = ax.get_legend()
                    if legend is not None:
                        legend.remove()
        sns.despine(figure)
    return _write(figure, path)


def _write(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
