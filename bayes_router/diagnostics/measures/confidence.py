"""Is this route right?

The probability that a choice is within a tolerance of the best, fitted to measured regret.

The posterior's own probability that a weight is the largest is about the weight, not about the
loss. This is fitted to the regret of forced routes on some text and read on other text, in two
steps. What can be foreseen is above all how much hangs on a route, not which side it falls on: so a
linear regression foretells the logarithm of the spread, max - min of the losses under the routes,
from what a routed pass knows of a token, layer and unit; and a logistic regression on that and the
same columns foretells whether the choice is right. Beside it stand the posterior's own probability,
that under one temperature, under one a layer, and under vector scaling (Guo et al. 2017, arXiv
1706.04599), and split conformal sets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize

from bayes_router.checks import require
from bayes_router.diagnostics.measures.bootstrap import Array, Estimate, clustered
from bayes_router.diagnostics.measures.calibration import (
    at_temperature,
    auroc,
    expected_calibration_error,
    fit_temperature,
    rank_correlation,
)
from bayes_router.diagnostics.measures.references import references
from bayes_router.diagnostics.measures.regression import Linear, Logistic, Standard
from bayes_router.diagnostics.measures.regret import SEEN, spread_of

RIDGE = 30.0  # of both regressions
LEAST = 1e-4  # of a stated probability
LEAST_SPREAD = 0.01  # of the tolerance: less than that hangs on nothing


class Confidence:
    """The probability that a route is within `tolerance` nats of the best.

    Args:
        frame: of `routing_regret`, from text that neither the fit nor the reading sees.
        experts: names, in the order of the routing latent.
        tolerance: nats.

    Raises:
        ValueError: all choices were right, or none.
    """

    def __init__(self, frame: pd.DataFrame, experts: Sequence[str], tolerance: float):
        self.experts, self.tolerance = list(experts), tolerance
        self.seen = [name for name in SEEN if name in frame]  # frames of before have none
        self.latents = sorted(set(_latents(frame)))  # (layer, unit)
        self.layers = sorted({layer for layer, _ in self.latents})
        right = right_within(frame, tolerance)
        both = bool(right.any() and not right.all())
        require(
            both,
            "regret",
            "choices right and wrong",
            f"{right.mean():.0%} right",
            "choose another tolerance",
        )
        self.common = Standard.of(self._known(frame))
        spread = np.log(spread_of(frame, self.experts) + LEAST_SPREAD * tolerance)
        self.spread = Linear.fit(self._of_spread(frame), spread, RIDGE)
        self.size = Standard.of(self.spread(self._of_spread(frame)))
        self.model = Logistic.fit(self._columns(frame), right, RIDGE)

    def __call__(self, frame: pd.DataFrame) -> Array:
        """Stated probabilities [N] of the rows of a frame like that of the fit.

        Losses and regret are not looked at.
        """
        return self.model(self._columns(frame))

    def _known(self, frame: pd.DataFrame) -> Array:
        """What the pass knows of a token, whatever layer it is in.

        How sure the posterior is, how sure the prediction, where, and what surprised it before.
        """
        mean = frame[[f"mean_{name}" for name in self.experts]].to_numpy().clip(LEAST, 1 - LEAST)
        stated = mean[np.arange(len(mean)), self._chosen(frame)]
        entropy, position = frame["predictive_entropy"].to_numpy(), frame["position"].to_numpy()
        columns = [
            np.log(stated / (1 - stated)),
            frame["entropy_of_mean"].to_numpy(),
            np.log(frame["total_concentration"].to_numpy()),
            entropy,
            np.log(entropy + 0.01),
            np.log(entropy + 0.01) ** 2,
            np.log1p(position),
            np.log1p(position) * np.log(entropy + 0.01),
            *(frame[name].to_numpy() for name in self.seen),
        ]
        return np.column_stack(columns)

    def _chosen(self, frame: pd.DataFrame) -> npt.NDArray[np.int64]:
        return np.array([self.experts.index(name) for name in frame["choice"]])

    def _taken(self, frame: pd.DataFrame) -> list[Array]:
        """Indicators of layer and expert taken."""
        layer, chosen = frame["layer"].to_numpy(), self._chosen(frame)
        pairs = ((one, e) for one in self.layers for e in range(len(self.experts)))
        return [((layer == one) & (chosen == e)).astype(float) for one, e in pairs]

    def _of_spread(self, frame: pd.DataFrame) -> Array:
        """Columns of the spread: `_known`, and of which layer, unit and expert."""
        of = _latents(frame)
        units = [np.array([one == latent for one in of], dtype=float) for latent in self.latents]
        return np.column_stack([self.common(self._known(frame)), *self._taken(frame), *units])

    def _columns(self, frame: pd.DataFrame) -> Array:
        """Columns of right or wrong: the spread foretold beside `_known`, by layer and expert."""
        common = self.common(self._known(frame))
        size, chosen = self.size(self.spread(self._of_spread(frame))), self._chosen(frame)
        sizes = [size, size**2, *(size * (chosen == e) for e in range(len(self.experts)))]
        return np.column_stack([common, *sizes, *self._taken(frame)])


def _latents(frame: pd.DataFrame) -> list[tuple[int, int]]:
    """Layer and unit of each row."""
    unit = frame["unit"] if "unit" in frame else pd.Series(0, frame.index)
    return list(zip(frame["layer"].astype(int), unit.astype(int), strict=True))


def right_within(frame: pd.DataFrame, tolerance: float) -> npt.NDArray[np.bool_]:
    """Which choices lose at most `tolerance` nats to the best."""
    return np.asarray(frame["regret"].to_numpy() <= tolerance)


class Quality(NamedTuple):
    """What stated probabilities are worth, each figure with its interval over windows."""

    stated: Estimate  # mean
    right: Estimate  # share
    ece: Estimate
    gain: Estimate  # 1 - Brier score / that of the base rate of the fit, which knows nothing
    auroc: Estimate
    rank: Estimate  # rank correlation of 1 - stated with regret
    # the same with the regret expected of the prediction, where the frame has that: without the
    # chance of which token followed
    expected_rank: Estimate | None = None


def quality(
    stated: Array, frame: pd.DataFrame, tolerance: float, base_rate: float, draws: int = 400
) -> Quality:
    """Read stated probabilities [N] against the regret of a frame.

    `base_rate` is the share right where it was fitted.
    """
    right, regret = right_within(frame, tolerance), frame["regret"].to_numpy()

    def gain(rows: npt.NDArray[np.int64]) -> float:
        brier, plain = ((p - right[rows]) ** 2 for p in (stated[rows], base_rate))
        return float(1 - brier.mean() / plain.mean())

    figures = {
        "stated": lambda rows: float(stated[rows].mean()),
        "right": lambda rows: float(right[rows].mean()),
        "ece": lambda rows: expected_calibration_error(stated[rows], right[rows]),
        "gain": gain,
        "auroc": lambda rows: auroc(stated[rows][right[rows]], stated[rows][~right[rows]]),
        "rank": lambda rows: rank_correlation(1 - stated[rows], regret[rows]),
    }
    if "foreseen" in frame:
        foreseen = frame["foreseen"].to_numpy()
        figures["expected_rank"] = lambda rows: rank_correlation(1 - stated[rows], foreseen[rows])
    return Quality(
        **{
            name: clustered(of, frame["sequence"].to_numpy(), draws=draws)
            for name, of in figures.items()
        }
    )


def split(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The first and the last half of the windows: the first is for fitting, the last for reading.

    Raises:
        ValueError: fewer than four windows.
    """
    names = np.sort(frame["sequence"].unique())
    require(
        len(names) >= 4,
        "regret",
        "at least four sequences",
        len(names),
        "force routes in more windows",
    )
    first = frame["sequence"].isin(names[: len(names) // 2])
    return frame[first].reset_index(drop=True), frame[~first].reset_index(drop=True)


def baselines(
    fitted: pd.DataFrame, read: pd.DataFrame, experts: Sequence[str], tolerance: float
) -> dict[str, Array]:
    """Stated probabilities [N] of the rows of `read` by the usual means.

    Their parameters are fitted on the other frame.
    """
    names = [f"largest_{name}" for name in experts]
    p, q = fitted[names].to_numpy(), read[names].to_numpy()
    chosen, taken = (
        np.array([list(experts).index(name) for name in f["choice"]]) for f in (fitted, read)
    )
    right, rows = right_within(fitted, tolerance), np.arange(len(read))
    found = {"posterior": q[rows, taken]}
    found["temperature"] = at_temperature(q, fit_temperature(p, chosen, right))[rows, taken]
    by_layer = np.empty(len(read))
    for layer in np.unique(read["layer"]):
        here, there = (fitted["layer"] == layer).to_numpy(), (read["layer"] == layer).to_numpy()
        temperature = fit_temperature(p[here], chosen[here], right[here])
        by_layer[there] = at_temperature(q[there], temperature)[
            np.arange(there.sum()), taken[there]
        ]
    found["temperature a layer"] = by_layer
    found["vector scaling"] = _vector_scaled(p, chosen, right, q)[rows, taken]
    return found


def _vector_scaled(
    p: Array, chosen: npt.NDArray[np.int64], right: npt.NDArray[np.bool_], q: Array
) -> Array:
    """softmax(w * log p + b), [N, E].

    w and b have the least cross-entropy of whether the choice was right.
    """
    E, rows = p.shape[1], np.arange(len(p))

    def scaled(parameters: Array, of: Array) -> Array:
        log = np.log(np.maximum(of, 1e-12)) * parameters[:E] + parameters[E:]
        odds = np.exp(log - log.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))

    def loss(parameters: Array) -> float:
        stated = scaled(parameters, p)[rows, chosen].clip(1e-6, 1 - 1e-6)
        return float(
            -np.mean(np.where(right, np.log(stated), np.log1p(-stated)))
            + 1e-4 * np.square(parameters).sum()
        )

    start = np.concatenate([np.full(E, 0.2), np.zeros(E)])
    return scaled(minimize(loss, start, method="L-BFGS-B").x, q)


class Conformal(NamedTuple):
    """Sets of experts that hold the best one as often as asked: split conformal prediction."""

    asked: float
    coverage: Estimate
    size: float  # mean number of experts in a set


def conformal_sets(
    fitted: pd.DataFrame, read: pd.DataFrame, experts: Sequence[str], coverage: float = 0.9
) -> Conformal:
    """Every expert whose stated probability is high enough.

    The threshold is the quantile of those of the best experts in `fitted`.

    Raises:
        ValueError: a coverage that is none, or too few rows for it.
    """
    require(0 < coverage < 1, "coverage", "a probability between 0 and 1", coverage)
    names, losses = ([f"{kind}_{name}" for name in experts] for kind in ("largest", "loss"))
    needed = int(np.ceil(coverage / (1 - coverage)))
    require(
        len(fitted) >= needed,
        "regret",
        f"at least {needed} rows for a coverage of {coverage:g}",
        len(fitted),
    )
    p, best = fitted[names].to_numpy(), fitted[losses].to_numpy().argmin(1)
    score = np.sort(1 - p[np.arange(len(p)), best])
    threshold = score[min(int(np.ceil((len(score) + 1) * coverage)), len(score)) - 1]
    kept = 1 - read[names].to_numpy() <= threshold
    hit = kept[np.arange(len(read)), read[losses].to_numpy().argmin(1)]
    return Conformal(
        coverage,
        clustered(lambda rows: float(hit[rows].mean()), read["sequence"]),
        float(kept.sum(1).mean()),
    )


def stated_by(
    fitted: pd.DataFrame, read: pd.DataFrame, experts: Sequence[str], tolerance: float
) -> dict[str, Array]:
    """Stated probabilities [N] of the rows of `read`: of `baselines`, and of `Confidence`."""
    found = baselines(fitted, read, experts, tolerance)
    return found | {"confidence": Confidence(fitted, experts, tolerance)(read)}


def confidence_table(
    fitted: pd.DataFrame,
    read: pd.DataFrame,
    experts: Sequence[str],
    tolerance: float,
    draws: int = 400,
) -> pd.DataFrame:
    """Every figure of `quality` by what states it, `conformal_sets`, and `references`.

    Columns stated by, figure, value, low, high, n.
    """
    base = float(right_within(fitted, tolerance).mean())
    rows = [
        {"stated by": name, "figure": figure, **estimate._asdict()}
        for name, p in stated_by(fitted, read, experts, tolerance).items()
        for figure, estimate in quality(p, read, tolerance, base, draws)._asdict().items()
        if estimate is not None
    ]
    sets, by = conformal_sets(fitted, read, experts), {"stated by": "conformal sets"}
    rows.append(by | {"figure": f"coverage of {sets.asked:g}", **sets.coverage._asdict()})
    rows.append(by | {"figure": "experts in a set", "value": sets.size, "n": len(read)})
    return pd.DataFrame(rows + references(read, draws))
