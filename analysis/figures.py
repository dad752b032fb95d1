"""What the studies of a run share: figures fit for print beside their tables."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from bayes_router.files import write_whole


def write(
    out: Path, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, Callable[[], Axes]]
) -> list[Path]:
    """Write NAME.csv for each table, NAME.pdf and NAME.png for each figure; the paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in tables.items():
        paths.append(out / f"{name}.csv")
        write_whole(paths[-1], lambda path: table.to_csv(path, index=table.index.name is not None))  # noqa: B023
    with (
        sns.axes_style("ticks"),
        sns.plotting_context("paper"),
        plt.rc_context({"pdf.fonttype": 42}),
    ):
        for name, draw in figures.items():
            figure = draw().get_figure(root=True)
            assert figure is not None
            for suffix in ("pdf", "png"):
                paths.append(out / f"{name}.{suffix}")
                figure.savefig(paths[-1], dpi=300, bbox_inches="tight")
            plt.close(figure)
    return paths
