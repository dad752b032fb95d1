"""A figure with its interval.

The bootstrap over whole windows, whose tokens are not independent of one another.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bayes_router.checks import require

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
DRAWS = 400
LEVEL = 0.95


class Estimate(NamedTuple):
    """A figure, the ends of its interval at `LEVEL`, and from how many rows it is."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({LEVEL:.0%} {self.low:.3f} to {self.high:.3f}, n = {self.n:,})"


def clustered(
    statistic: Callable[[Indices], float],
    cluster: npt.ArrayLike,
    *,
    kind: npt.ArrayLike | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """The percentile interval of a statistic when whole clusters are drawn anew, with repetition.

    Args:
        statistic: (indices of rows, a row as often as its cluster was drawn) -> figure.
        cluster: of each row, a whole number: the window that it is of.
        kind: of each row, where clusters of several kinds are compared: as many of each are drawn
            as there are.
        draws: of the clusters.
        level: mass inside.
        seed: of the draws.

    Raises:
        ValueError: fewer than two clusters, from which nothing can be said about another.
    """
    require(0 < level < 1, "level", "a probability between 0 and 1", level)
    label = np.asarray(cluster)
    order = np.argsort(label, kind="stable")
    names, starts = np.unique(label[order], return_index=True)
    require(
        len(names) >= 2,
        "windows",
        "at least two, for an interval",
        len(names),
        "read a longer text",
    )
    members = np.split(order, starts[1:])
    of = (
        np.zeros(len(members), int)
        if kind is None
        else np.asarray(kind)[[one[0] for one in members]]
    )
    kinds = [np.flatnonzero(of == one) for one in np.unique(of)]
    random = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = np.concatenate([random.choice(one, len(one)) for one in kinds])
        found.append(statistic(np.concatenate([members[i] for i in drawn])))
    known = np.asarray(found)[~np.isnan(found)]
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(known, ends) if len(known) else (np.nan, np.nan)
    return Estimate(statistic(np.arange(len(label))), float(low), float(high), len(label))
