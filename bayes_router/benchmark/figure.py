"""The figure of the benchmark: speed-up over full attention by length, experts alone, and memory."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(table: pd.DataFrame, path: Path) -> None:
    """Four panels; what was run, where and with which versions stands below them."""
    sns.set_theme(style="whitegrid", context="paper", font_scale=1.1)
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.6), layout="constrained")
    main = table[table["B"].eq(1) & table["Dh"].eq(64) | table["what"].eq("decode")]
    forward = main[main["what"].eq("forward") & main["variant"].eq("auto")]
    _speedup(forward.assign(routes=forward["run"].map({1: "token by token", 64: "runs of 64"})), axes[0], "Forward pass", True)
    both = main[main["what"].isin(["forward+backward", "decode"]) & main["variant"].isin(["auto", "cache"])]
    _speedup(both.assign(mix=both["what"] + " " + both["mix"], routes=""), axes[1], "Training pass and decoding step", True)
    _clocks(main, axes[2])
    _alone(table[table["what"] == "alone"], axes[3])
    note(figure, table)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def note(figure: Figure, table: pd.DataFrame) -> None:
    """The device, versions and command of a table, below its figure."""
    first = table.iloc[0]
    figure.supxlabel(f"{first['device']}; {first['versions']}\n{first['command']}", fontsize=8, color="0.4")


def _speedup(data: pd.DataFrame, axes: Axes, title: str, ideal: bool) -> None:
    styled = "routes" if data["routes"].nunique() > 1 else None
    sns.lineplot(data, x="T", y="speedup", hue="mix", style=styled, marker="o", errorbar=None, ax=axes)
    if ideal:
        for index, (_, group) in enumerate(data.groupby("mix", sort=False)):
            group = group.sort_values("T").drop_duplicates("T")
            axes.plot(group["T"], group["ideal"], ":", color=sns.color_palette()[index % 10], linewidth=1)
    _scales(data, axes, f"{title} (dotted: ideal)" if ideal else title)


def _clocks(main: pd.DataFrame, axes: Axes) -> None:
    """The forward pass of the first mix by each clock: inside a model, alone, as a CUDA graph."""
    forward = main[main["what"].eq("forward") & main["run"].eq(1)]
    forward = forward[forward["mix"].eq(forward["mix"].iloc[0])]
    auto = forward[forward["variant"].eq("auto")]
    graph = forward[forward["variant"].eq("graph auto")]
    data = pd.concat(
        [
            auto.assign(mix="busy stream"),
            auto.assign(mix="isolated call", speedup=auto["wall_speedup"]),
            graph.assign(mix="graph over graph"),
        ]
    )
    _speedup(data.assign(routes=""), axes, f"Forward pass {forward['mix'].iloc[0]} by clock", False)


def _scales(data: pd.DataFrame, axes: Axes, title: str) -> None:
    axes.axhline(1, color="0.3", linewidth=1)
    low = min(float(data["speedup"].min()), 0.9) / 1.15
    axes.axhspan(low, 1, color="tab:red", alpha=0.06)  # where routing loses
    axes.set(xscale="log", yscale="log", title=title, xlabel="tokens T", ylabel="times faster than full attention")
    axes.set_ylim(bottom=low)
    axes.set_xticks(sorted(data["T"].unique()), [str(t) for t in sorted(data["T"].unique())], rotation=45)
    ticks = [2.0**n for n in range(-5, 6) if low <= 2.0**n <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8, title="")


def _alone(data: pd.DataFrame, axes: Axes) -> None:
    sns.lineplot(data, x="T", y="ms", hue="variant", marker="o", ax=axes)
    axes.set(title="Linear and local alone", xlabel="tokens T", ylabel="milliseconds (solid)")
    axes.set_ylim(bottom=0)
    if "peak_mib" in data and data["peak_mib"].notna().any():
        twin = axes.twinx()
        twin.grid(False)
        sns.lineplot(data, x="T", y="peak_mib", hue="variant", linestyle="--", marker="s", ax=twin, legend=False)
        twin.set_ylabel("MiB beyond the inputs (dashed)")
        twin.set_ylim(bottom=0)
