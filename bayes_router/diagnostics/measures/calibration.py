"""Is the stated uncertainty true? Forced routes give the regret of each choice.

From the regrets follows what a calibrated router says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata, spearmanr

from bayes_router.checks import require
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.measures.bootstrap import Array, Estimate, clustered
from bayes_router.diagnostics.measures.verdict import Severity, Verdict
from bayes_router.routing.posterior import (
    probability_of_largest,
)
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import RoutingMode

BINS = 10
INTERVAL_DRAWS = 200


@dataclass(frozen=True)
class CalibrationThresholds:
    """What counts as right, and where a verdict begins.

    Attributes:
        tolerance: nats by which a route may lose to the best one and still count as right.
        ece: expected calibration error above which the stated probabilities are not to be believed.
        correlation: rank correlation of uncertainty and regret below which uncertainty does not
            rank mistakes.
        auroc: below which uncertainty does not tell another text apart (0.5 is chance).
    """

    tolerance: float = 0.01
    ece: float = 0.1
    correlation: float = 0.1
    auroc: float = 0.6

    def __post_init__(self) -> None:
        """Check the fields."""
        require(self.tolerance >= 0, "tolerance", "0 or more nats", self.tolerance)
        for name in ("ece", "auroc"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))


def at_temperature(probability: Array, temperature: float) -> Array:
    """probability^(1 / temperature), normalised over experts [N, E].

    1 changes nothing, large is flat, small is sure.
    """
    log = np.log(np.maximum(probability, 1e-12)) / temperature
    odds = np.exp(log - log.max(1, keepdims=True))
    return np.asarray(odds / odds.sum(1, keepdims=True))


def fit_temperature(
    probability: Array, choice: npt.NDArray[np.int64], right: npt.NDArray[np.bool_]
) -> float:
    """The temperature under which the stated probabilities of choices [N] foretell best.

    What they foretell is whether the choice was right.

    Least binary cross-entropy over temperatures from exp(-3) to exp(5) (temperature scaling, Guo et
    al. 2017, arXiv 1706.04599, for routes). A single temperature cannot state less than 1 / E or
    turn the order of tokens round.
    """
    require(len(right) > 0, "right", "at least one choice", "none")
    row = np.arange(len(right))

    def loss(log_temperature: float) -> float:
        p = at_temperature(probability, np.exp(log_temperature))[row, choice].clip(1e-6, 1 - 1e-6)
        return float(-np.mean(np.where(right, np.log(p), np.log1p(-p))))

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 5.0), method="bounded").x))


def _bins(stated: Array, bins: int) -> npt.NDArray[np.int64]:
    """Of each choice, which of so many bins of equal width its stated probability is in."""
    require(bins >= 1, "bins", "at least 1", bins)
    return np.minimum((np.asarray(stated) * bins).astype(np.int64), bins - 1)


def reliability(stated: Array, right: npt.NDArray[np.bool_], bins: int = BINS) -> pd.DataFrame:
    """Stated against observed: one row a bin of equal width that holds a choice.

    `error` is the binomial standard error.
    """
    index = _bins(stated, bins)
    frame = pd.DataFrame({"bin": index, "stated": stated, "observed": np.asarray(right, float)})
    table = frame.groupby("bin").agg(
        stated=("stated", "mean"), observed=("observed", "mean"), count=("stated", "size")
    )
    # a bin of two is not certain of its share
    shrunk = (table["observed"] * table["count"] + 1) / (table["count"] + 2)
    table["error"] = np.sqrt(shrunk * (1 - shrunk) / table["count"])
    return table.reset_index()


def expected_calibration_error(
    stated: Array, right: npt.NDArray[np.bool_], bins: int = BINS
) -> float:
    """Mean |stated - observed| of the bins of choices, as `reliability` has them; 0 is calibrated.

    That is |sum of stated - number of right ones| over the bins, for each choice.
    """
    _, index = np.unique(_bins(stated, bins), return_inverse=True)
    apart = np.bincount(index, np.asarray(stated) - np.asarray(right))
    return float(np.abs(apart).sum() / len(stated))


class Calibration(NamedTuple):
    """Before and after a temperature that was fitted on the even sequences.

    All figures are of the odd ones.
    """

    temperature: float
    right: float  # share of choices within the tolerance of the best
    stated: float  # mean stated probability
    ece: float
    ece_tempered: float
    before: pd.DataFrame  # reliability tables
    after: pd.DataFrame
    ece_interval: Estimate  # over windows
    right_interval: Estimate
    stated_interval: Estimate
    tempered_interval: Estimate  # of `ece_tempered`


def calibrate(
    regret: pd.DataFrame, experts: Sequence[str], thresholds: CalibrationThresholds | None = None
) -> Calibration:
    """Compare the posterior probability of the choice with how often it was right.

    Stated is that it is the largest weight; right is to be as good as the best.
    """
    t = thresholds or CalibrationThresholds()
    probability = regret[[f"largest_{name}" for name in experts]].to_numpy()
    choice = np.array([list(experts).index(name) for name in regret["choice"]])
    right = (regret["regret"] <= t.tolerance).to_numpy()
    fitted = (regret["sequence"] % 2 == 0).to_numpy()
    sequences = regret["sequence"][~fitted].nunique()
    enough = bool(fitted.any()) and sequences >= 2
    require(enough, "regret", "at least four sequences", int(regret["sequence"].nunique()))
    temperature = fit_temperature(probability[fitted], choice[fitted], right[fitted])
    rows, tested = np.arange(int((~fitted).sum())), right[~fitted]
    stated = probability[~fitted][rows, choice[~fitted]]
    before = reliability(stated, tested)
    mended = at_temperature(probability[~fitted], temperature)[rows, choice[~fitted]]
    after = reliability(mended, tested)
    windows = regret["sequence"].to_numpy()[~fitted]

    def error(said: Array) -> Estimate:
        return clustered(
            lambda rows: expected_calibration_error(said[rows], tested[rows]),
            windows,
            draws=INTERVAL_DRAWS,
        )

    ece, ece_tempered = error(stated), error(mended)
    right_share = clustered(lambda rows: float(tested[rows].mean()), windows)
    stated_mean = clustered(lambda rows: float(stated[rows].mean()), windows)
    return Calibration(
        temperature,
        right_share.value,
        stated_mean.value,
        ece.value,
        ece_tempered.value,
        before,
        after,
        ece,
        right_share,
        stated_mean,
        ece_tempered,
    )


def rank_correlation(x: Array | pd.Series, y: Array | pd.Series) -> float:
    """Spearman's, ties at their mean rank; nan where one of them is constant or unknown."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def auroc(positive: Array, negative: Array) -> float:
    """P(score of a positive > score of a negative), ties counted half (Mann and Whitney).

    0.5 is chance.
    """
    require(
        len(positive) > 0 and len(negative) > 0,
        "auroc",
        "scores on both sides",
        (len(positive), len(negative)),
    )
    ranks = rankdata(np.concatenate([positive, negative]))
    n = len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


@torch.no_grad()
def stability(
    model: RoutedLanguageModel, batches: Iterator[Batch], noise: float = 0.1, seed: int = 0
) -> pd.DataFrame:
    """Share of hard choices that change when Gaussian noise is added to the embeddings.

    Args:
        model: the fitted model.
        batches: windows of text.
        noise: its standard deviation over that of the embeddings.
        seed: of the noise; the caller's generator is left as it was.

    Returns:
        One row a layer: `flips`, and `auroc`, how well the posterior's probability of being wrong
            foretells a flip.
    """
    require(noise >= 0, "noise", "0 or more", noise)
    embed, flipped, wrong = model.network.embed, [], []
    scale = noise * embed.weight.std()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in batches:
            tokens = batch.tokens.to(embed.weight.device)
            out = model(tokens, RoutingMode.HARD)
            hook = embed.register_forward_hook(
                lambda module, inputs, output: output + scale * torch.randn_like(output)
            )
            try:
                moved = model(tokens, RoutingMode.HARD).route
            finally:
                hook.remove()
            flipped.append((moved != out.route).flatten(1).cpu())
            q = out.concentration.flatten(1, 3).cpu()
            wrong.append(1 - probability_of_largest(q, q.argmax(-1)))
    flip, score = torch.cat(flipped, 1).numpy(), torch.cat(wrong, 1).numpy()
    rows = []
    for layer, (f, s) in enumerate(zip(flip, score, strict=True)):
        both = 0 < f.mean() < 1
        rows.append(
            {
                "layer": layer,
                "flips": f.mean(),
                "auroc": auroc(s[f], s[~f]) if both else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def calibration_verdicts(
    regret: pd.DataFrame, calibration: Calibration, thresholds: CalibrationThresholds | None = None
) -> list[Verdict]:
    """What regret and calibration mean."""
    t, c = thresholds or CalibrationThresholds(), calibration
    good = c.ece_interval.high <= t.ece
    mended = (
        f"A temperature of {c.temperature:.2f}, fitted on other sequences, makes it "
        f"{c.tempered_interval}."
    )

    def share(of: Estimate) -> str:
        return f"{of.value:.0%} ({of.low:.0%} to {of.high:.0%})"

    found = [
        Verdict(
            "calibration",
            Severity.GOOD if good else Severity.WARNING,
            f"the posterior's probability that the weight of its choice is the largest is "
            f"{share(c.stated_interval)} on average; in hindsight the choice is within "
            f"{t.tolerance:g} nats of the best {share(c.right_interval)} of the time: expected "
            f"calibration "
            f"error {c.ece_interval} (threshold {t.ece:g}, for all of the interval). {mended}",
            ""
            if good
            else (
                "the tempered probabilities where a decision hangs on them (policy.threshold "
                "of conservative)."
            ),
        )
    ]
    entropy, lost = (regret[name].to_numpy() for name in ("entropy_of_mean", "regret"))
    rho = clustered(
        lambda rows: rank_correlation(entropy[rows], lost[rows]),
        regret["sequence"].to_numpy(),
        draws=INTERVAL_DRAWS,
    )
    mean = clustered(lambda rows: float(lost[rows].mean()), regret["sequence"].to_numpy())
    ranks = rho.low >= t.correlation
    said = (
        f"(threshold {t.correlation:g}): uncertainty ranks the choices that cost."
        if ranks
        else f"(threshold {t.correlation:g}, for all of the interval): it cannot be said that "
        "uncertainty ranks the choices that cost."
    )
    found.append(
        Verdict(
            "regret",
            Severity.GOOD if ranks else Severity.NOTE,
            f"the mean regret of a choice, in hindsight, is {mean} nats; its rank correlation with "
            f"the entropy of the mean route is {rho} {said}",
            ""
            if ranks
            else "not deciding by uncertainty alone: budget or argmax rather than conservative.",
        )
    )
    return found
