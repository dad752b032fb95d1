"""The figure of the benchmark.

Speed-up over full attention by length, experts alone, and memory.
"""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DRAWN = ("run", "mix", "ms", "speedup", "wall_speedup", "ideal", "over_full", "peak_mib")
"""Columns that a table lacks if no row of it was measured that has them."""


def draw(table: pd.DataFrame, path: Path) -> None:
    """Six panels; what was run, where and with which versions stands below them."""
    table = table.reindex(columns=[*table, *(name for name in DRAWN if name not in table)])
    sns.set_theme(style="whitegrid", context="paper", font_scale=1.1)
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    routed = table[table["variant"].isin(["auto", "cache"])]
    for what, title, place in (
        ("forward", "Forward pass", axes[0, 0]),
        ("forward+backward", "Forward and backward pass", axes[0, 1]),
        ("decode", "Decoding step, T keys", axes[0, 2]),
    ):
        _speedup(_usual(routed[routed["what"].eq(what)]), place, f"{title} (dotted: ideal)", True)
    _clocks(table, axes[1, 0])
    _alone(table[table["what"] == "alone"], axes[1, 1])
    _memory(table[table["what"] == "training memory"], axes[1, 2])
    note(figure, table)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _usual(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the batch, heads and head size that were measured at most lengths."""
    sizes = ["B", "H", "Dh"]
    lengths = rows.groupby(sizes)["T"].nunique()
    if lengths.empty:
        return rows
    return rows[(rows[sizes] == pd.Series(lengths.idxmax(), index=sizes)).all(axis=1)]


def note(figure: Figure, table: pd.DataFrame) -> None:
    """The device, versions and command of a table, below its figure."""
    first = table.iloc[0]
    figure.supxlabel(
        f"{first['device']}; {first['versions']}\n{first['command']}", fontsize=8, color="0.4"
    )


def _speedup(data: pd.DataFrame, axes: Axes, title: str, ideal: bool) -> None:
    if data.empty:
        axes.set(title=f"{title}: not measured")
        return
    data = data.assign(
        routes=data["run"].map(lambda run: "one by one" if run == 1 else f"runs of {run:g}")
    )
    styled = "routes" if data["routes"].nunique() > 1 else None
    sns.lineplot(
        data, x="T", y="speedup", hue="mix", style=styled, marker="o", errorbar=None, ax=axes
    )
    if ideal:
        for index, (_, group) in enumerate(data.groupby("mix", sort=False)):
            group = group.sort_values("T").drop_duplicates("T")
            axes.plot(
                group["T"], group["ideal"], ":", color=sns.color_palette()[index % 10], linewidth=1
            )
    _scales(data, axes, title)


def _clocks(table: pd.DataFrame, axes: Axes) -> None:
    """The forward pass of the first mix by each clock: inside a model, alone, as a CUDA graph."""
    forward = table[table["what"].eq("forward") & table["run"].eq(1)]
    auto, graph = (_usual(forward[forward["variant"].eq(name)]) for name in ("auto", "graph auto"))
    mix = auto["mix"].iloc[0] if len(auto) else ""
    data = pd.concat(
        [
            auto.assign(clock="busy stream"),
            auto.assign(clock="isolated call", speedup=auto["wall_speedup"]),
            graph.assign(clock="graph over graph"),
        ]
    )
    _speedup(
        data[data["mix"].eq(mix)].assign(mix=lambda rows: rows["clock"]),
        axes,
        f"Forward pass {mix} by clock",
        False,
    )


def _scales(data: pd.DataFrame, axes: Axes, title: str) -> None:
    axes.axhline(1, color="0.3", linewidth=1)
    low = min(float(data["speedup"].min()), 0.9) / 1.15
    axes.axhspan(low, 1, color="tab:red", alpha=0.06)  # where routing loses
    axes.set(
        xscale="log",
        yscale="log",
        title=title,
        xlabel="tokens T",
        ylabel="times faster than full attention",
    )
    axes.set_ylim(bottom=low)
    axes.set_xticks(
        sorted(data["T"].unique()), [str(t) for t in sorted(data["T"].unique())], rotation=45
    )
    ticks = [2.0**n for n in range(-5, 6) if low <= 2.0**n <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8, title="")


def _memory(data: pd.DataFrame, axes: Axes) -> None:
    """Peak memory of training over full attention's."""
    if data.empty:
        axes.set(title="Training memory: not measured")
        return
    sns.barplot(data, x="variant", y="over_full", errorbar=None, ax=axes)
    axes.axhline(1, color="0.3", linewidth=1)
    axes.set(
        title=f"Training memory at T {data['T'].iloc[0]}",
        xlabel="",
        ylabel="times full attention's",
    )
    for place, peak in enumerate(data["peak_mib"]):
        axes.annotate(f"{peak:.0f} MiB", (place, 0.02), ha="center", color="white", fontsize=9)


def _alone(data: pd.DataFrame, axes: Axes) -> None:
    if data.empty:
        axes.set(title="Linear and local alone: not measured")
        return
    sns.lineplot(data, x="T", y="ms", hue="variant", marker="o", ax=axes)
    axes.set(title="Linear and local alone", xlabel="tokens T", ylabel="milliseconds (solid)")
    axes.set_ylim(bottom=0)
    if "peak_mib" in data and data["peak_mib"].notna().any():
        twin = axes.twinx()
        twin.grid(False)
        sns.lineplot(
            data,
            x="T",
            y="peak_mib",
            hue="variant",
            linestyle="--",
            marker="s",
            ax=twin,
            legend=False,
        )
        twin.set_ylabel("MiB beyond the inputs (dashed)")
        twin.set_ylim(bottom=0)
