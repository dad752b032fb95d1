"""The figure of the dial and its static rivals."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from bayes_router.diagnostics.figures.run import PALETTE


def plot_rivals(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Loss against executed cost: the dial as a line, each static rival as a named square."""
    ax = ax or plt.subplots(figsize=(6, 4))[1]
    for kind, marker, line, colour in (
        ("dial", "o", "-", PALETTE[1]),
        ("static", "s", "none", PALETTE[0]),
    ):
        part = table[table["kind"] == kind].sort_values("cost")
        bars = [part["nll"] - part["low"], part["high"] - part["nll"]]
        ax.errorbar(
            part["cost"],
            part["nll"],
            bars,
            marker=marker,
            linestyle=line,
            color=colour,
            capsize=3,
            label=kind,
        )
    for number, row in enumerate(table[table["kind"] == "static"].itertuples()):
        place = (float(row.cost), float(row.nll))  # type: ignore[arg-type]
        name = str(row.name).split(":")[0]
        ax.annotate(
            name, place, xytext=(6, 6 - 16 * (number % 2)), textcoords="offset points", fontsize=8
        )
    ax.set(xlabel="executed cost (full = 1)", ylabel="held-out nll, HARD (nats per token)")
    ax.margins(x=0.2)
    ax.legend(frameon=False)
    return ax
