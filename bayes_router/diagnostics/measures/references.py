"""What stands beside a rank correlation with regret: how much of it there is to be had."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd

from bayes_router.diagnostics.measures.bootstrap import clustered
from bayes_router.diagnostics.measures.calibration import rank_correlation
from bayes_router.diagnostics.measures.regret import spread_of


def references(read: pd.DataFrame, draws: int = 400) -> list[dict[str, object]]:
    """What stands beside a rank correlation with regret: rows of `confidence_table`.

    The next token is chance to whoever has to foretell the regret of a route. `every route's
    prediction` is the regret expected when the predictions under all routes are known, and not the
    token; `measured twice` is how well the regret under one token drawn from the prediction ranks
    that under another: its root is what could be reached if tokens were drawn so. `the same at its
    best` is what the predictions under all routes, in whatever way they are used, reach of the
    regret as it came out: its rank correlation with a redrawn one, over that root (Spearman's
    correction for attenuation, 1904). `the spread itself` is that of the losses as it came out,
    which no pass knows: of two experts, all that can be had by knowing how much hangs on each
    route, where which side is right is a coin's toss.
    """
    experts = [c.removeprefix("loss_") for c in read.columns if c.startswith("loss_")]
    of, regret = {"the spread itself": spread_of(read, experts)}, read["regret"].to_numpy()
    if "foreseen" in read:
        of["every route's prediction"] = read["foreseen"].to_numpy()
    figures: dict[str, Callable[[npt.NDArray[np.int64]], float]] = {
        name: lambda rows, x=x: rank_correlation(x[rows], regret[rows])  # type: ignore[misc]
        for name, x in of.items()
    }
    if "redrawn" in read:
        one, other = read["redrawn"].to_numpy(), read["redrawn_again"].to_numpy()

        def twice(rows: npt.NDArray[np.int64]) -> float:
            return rank_correlation(one[rows], other[rows])

        def at_best(rows: npt.NDArray[np.int64]) -> float:
            found = [rank_correlation(x[rows], regret[rows]) for x in (one, other)]
            agreed = twice(rows)
            return float(np.mean(found) / np.sqrt(agreed)) if agreed > 0 else float("nan")

        figures |= {"measured twice": twice, "the same at its best": at_best}
    by_window = read["sequence"].to_numpy()
    found = list[dict[str, object]]()
    for name, statistic in figures.items():
        row: dict[str, object] = {"stated by": f"reference: {name}", "figure": "rank"}
        found.append(row | clustered(statistic, by_window, draws=draws)._asdict())
    return found
