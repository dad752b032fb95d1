"""The figure of a model end to end.

Prefill and decoding by length, routed and on full attention.
"""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, ScalarFormatter

from bayes_router.benchmark.figure import note


def draw(table: pd.DataFrame, path: Path) -> None:
    """Prefill time, decoding rate for each batch, and the speed-up of the routed model."""
    sns.set_theme(style="whitegrid", context="paper", font_scale=1.1)
    batches = sorted(table.loc[table["what"] == "decode", "B"].unique())
    figure, axes = plt.subplots(
        1, 2 + len(batches), figsize=(4.6 * (2 + len(batches)), 4.4), layout="constrained"
    )
    prefill = table[table["what"] == "prefill"]
    sns.lineplot(prefill, x="T", y="ms", hue="variant", marker="o", ax=axes[0])
    axes[0].set(
        title="Prefill", xlabel="tokens of the prompt T", ylabel="milliseconds", yscale="log"
    )
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    for place, batch in zip(axes[1:-1], batches, strict=True):
        decode = table[(table["what"] == "decode") & (table["B"] == batch)]
        sns.lineplot(decode, x="T", y="tokens_per_s", hue="variant", marker="o", ax=place)
        place.set(title=f"Decoding, batch {batch}", xlabel="tokens held T", ylabel="tokens / s")
        place.set_ylim(bottom=0)
    routed = table[table["variant"].isin(["routed", "graph routed"])]
    graphed = routed["variant"].map({"routed": "", "graph routed": ", as a graph"})
    routed = routed.assign(kind=routed["what"] + ", batch " + routed["B"].astype(str) + graphed)
    sns.lineplot(routed, x="T", y="speedup", hue="kind", marker="o", ax=axes[-1])
    axes[-1].axhline(1, color="0.3", linewidth=1)
    axes[-1].set(title="Routed over the fastest full", xlabel="tokens T", ylabel="times faster")
    axes[-1].set_ylim(bottom=0)
    lengths = sorted(table["T"].unique())
    for place in axes:
        place.set_xscale("log")
        place.set_xticks(lengths, [str(length) for length in lengths])
        place.minorticks_off()
        place.legend(fontsize=8, title="")
    note(figure, table)
    figure.savefig(path, dpi=130)
    plt.close(figure)
