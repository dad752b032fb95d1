"""The figure of `analysis.speed`: speed-up over full attention by length, experts alone, and memory."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def draw(table: pd.DataFrame, path: Path) -> None:
    """Three panels; what was run, where and with which torch stands below them."""
    sns.set_theme(style="whitegrid", context="paper", font_scale=1.1)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    _speedup(table[(table.what == "forward") & table.variant.eq("auto")], axes[0], "Forward pass, routed by `auto`")
    both = table[table.what.isin(["forward+backward", "decode"]) & table.variant.isin(["auto", "cache"])]
    _speedup(both.assign(mix=both.what + " " + both.mix, run=1), axes[1], "Training pass and decoding step")
    _alone(table[table.what == "alone"], axes[2])
    first = table.iloc[0]
    figure.supxlabel(f"{first.device}; torch {first.torch}; {first.command}", fontsize=8, color="0.4")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _speedup(data: pd.DataFrame, axes: Axes, title: str) -> None:
    data = data.assign(routes=data.run.map({1: "token by token", 64: "runs of 64"}))
    styled = "routes" if data.run.nunique() > 1 else None
    shapes = data.groupby("T").first().reset_index()[["T", "H", "B", "Dh"]]
    main = data.merge(shapes, on=["T", "H", "B", "Dh"]) if title.startswith("Forward") else data
    sns.lineplot(main, x="T", y="speedup", hue="mix", style=styled, marker="o", errorbar=None, ax=axes)
    for index, (_, group) in enumerate(main.groupby("mix", sort=False)):
        group = group.sort_values("T").drop_duplicates("T")
        axes.plot(group["T"], group["ideal"], ":", color=sns.color_palette()[index], linewidth=1)
    axes.axhline(1, color="0.3", linewidth=1)
    axes.set(xscale="log", yscale="log", title=title, xlabel="tokens T")
    axes.set_ylabel("times faster than full attention (dotted: ideal)")
    axes.set_xticks(sorted(main["T"].unique()), [str(t) for t in sorted(main["T"].unique())], rotation=45)
    axes.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["0.25", "0.5", "1", "2", "4", "8", "16"])
    axes.minorticks_off()


def _alone(data: pd.DataFrame, axes: Axes) -> None:
    sns.lineplot(data, x="T", y="ms", hue="variant", marker="o", ax=axes)
    twin = axes.twinx()
    twin.grid(False)
    sns.lineplot(data, x="T", y="peak_mib", hue="variant", linestyle="--", marker="s", ax=twin, legend=False)
    axes.set(title="Linear and local alone: time (solid), peak memory (dashed)", xlabel="tokens T", ylabel="milliseconds")
    axes.set_ylim(bottom=0)
    twin.set_ylabel("MiB beyond the inputs")
    twin.set_ylim(bottom=0)
