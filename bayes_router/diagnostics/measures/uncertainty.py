"""How sure the posterior is.

Per token as a frame, and per layer, position and kind of token in one streaming pass.
"""

from collections.abc import Iterable, Sequence
from enum import Enum

import numpy as np
import pandas as pd
import torch
from scipy.special import betaincinv
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.tokenisers import Tokeniser
from bayes_router.diagnostics.measures.kinds import TokenKind, kinds_of_vocabulary
from bayes_router.diagnostics.reading import Reading
from bayes_router.routing.posterior import (
    entropy_of_mean,
    expected_entropy,
    mutual_information,
    posterior_mean,
    probability_of_largest,
)

INTERVAL = 0.9
COST_DRAWS = 400
SURE_WEIGHT = 0.9
CHUNK = 16_384  # tokens at a time in the quadrature: 96 nodes each, so memory stays near 100 MB


def probability_right(concentration: Tensor) -> Tensor:
    """Posterior probability that the argmax of the mean is the largest weight.

    [..., E] -> float64 [...]; exact to 1e-5.
    """
    flat = concentration.reshape(-1, concentration.shape[-1])
    parts = [probability_of_largest(part, part.argmax(-1)) for part in flat.split(CHUNK)]
    return torch.cat(parts).reshape(concentration.shape[:-1])


def credible_interval(concentration: Tensor, interval: float = INTERVAL) -> tuple[Tensor, Tensor]:
    """Equal-tailed interval of each route weight, exact.

    Its marginal is Beta(concentration_e, total - concentration_e).

    Args:
        concentration: [..., E].
        interval: posterior mass inside, between 0 and 1.

    Returns:
        Lower and upper ends, float64 [..., E].
    """
    require(0 < interval < 1, "interval", "a probability between 0 and 1", interval)
    a = concentration.detach().double().cpu().numpy()
    if a.shape[-1] == 1:
        return torch.ones(a.shape), torch.ones(a.shape)
    b = np.maximum(a.sum(-1, keepdims=True) - a, np.finfo(float).tiny)
    tail = (1 - interval) / 2
    return torch.from_numpy(betaincinv(a, b, tail)), torch.from_numpy(betaincinv(a, b, 1 - tail))


def cost_interval(
    concentration: Tensor,
    cost_ratio: Tensor,
    interval: float = INTERVAL,
    draws: int = COST_DRAWS,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Equal-tailed interval of a token's attention cost, given its path.

    The cost is the mean over layers of cost_ratio . route.

    A weighted sum of Dirichlet weights has no closed quantile for more than two experts, so these
    are of `draws` draws.

    Args:
        concentration: [L, N, E].
        cost_ratio: [E], full = 1.
        interval: posterior mass inside.
        draws: of the routes of all layers.
        seed: of the draws; the caller's generator is left as it was.

    Returns:
        Lower and upper ends, float64 [N].
    """
    require(0 < interval < 1, "interval", "a probability between 0 and 1", interval)
    tails = torch.tensor([(1 - interval) / 2, (1 + interval) / 2], dtype=torch.float64)
    ends = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in concentration.detach().double().cpu().split(2048, 1):
            # [S, L, n, E]
            route = torch.distributions.Dirichlet(part, validate_args=False).sample((draws,))
            # [2, n]
            ends.append(torch.quantile((route @ cost_ratio.double().cpu()).mean(1), tails, dim=0))
    low, high = torch.cat(ends, 1)
    return low, high


def token_frame(
    concentration: Tensor, experts: Sequence[str], cost_ratio: Tensor, interval: float = INTERVAL
) -> pd.DataFrame:
    """Everything known of the routes of N tokens: one row a token and layer.

    Args:
        concentration: [L, N, E].
        experts: names of the E experts.
        cost_ratio: [E], full = 1.
        interval: posterior mass of the credible intervals.

    Returns:
        layer, token, choice, mean_<expert>, low_<expert>, high_<expert>, total_concentration,
        entropies and mutual information in nats, probability_right, cost (of the mean route of the
        layer), token_cost with its interval.
    """
    require(
        concentration.dim() == 3, "concentration", "shape [L, N, E]", tuple(concentration.shape)
    )
    L, N, _ = concentration.shape
    flat = concentration.detach().double().cpu().flatten(0, 1)
    mean = posterior_mean(flat)
    frame = pd.DataFrame({"layer": np.repeat(np.arange(L), N), "token": np.tile(np.arange(N), L)})
    frame["choice"] = np.array(experts)[flat.argmax(-1).numpy()]
    for e, name in enumerate(experts):
        frame[f"mean_{name}"] = mean[:, e].numpy()
    low, high = credible_interval(flat, interval)
    for e, name in enumerate(experts):
        frame[f"low_{name}"], frame[f"high_{name}"] = low[:, e].numpy(), high[:, e].numpy()
    measured = measures(flat, cost_ratio)
    for m, measure in enumerate(Measure):
        frame[measure.value] = measured[:, m].numpy()
    frame["token_cost"] = np.tile((mean @ cost_ratio.double().cpu()).view(L, N).mean(0).numpy(), L)
    cost_low, cost_high = cost_interval(concentration, cost_ratio, interval)
    frame["token_cost_low"], frame["token_cost_high"] = (
        np.tile(cost_low.numpy(), L),
        np.tile(cost_high.numpy(), L),
    )
    return frame


class Measure(Enum):
    """What is averaged over tokens; the values name columns."""

    ENTROPY_OF_MEAN = "entropy_of_mean"
    EXPECTED_ENTROPY = "expected_entropy"
    MUTUAL_INFORMATION = "mutual_information"
    PROBABILITY_RIGHT = "probability_right"
    TOTAL_CONCENTRATION = "total_concentration"
    COST = "cost"
    SURE = "sure"  # 1 where one weight of the mean exceeds 0.9


def measures(concentration: Tensor, cost_ratio: Tensor) -> Tensor:
    """All of `Measure` for concentrations [..., E]: float64 [..., M]."""
    q = concentration.detach().double().cpu()
    mean = posterior_mean(q)
    return torch.stack(
        [
            entropy_of_mean(q),
            expected_entropy(q),
            mutual_information(q),
            probability_right(q),
            q.sum(-1),
            mean @ cost_ratio.double().cpu(),
            (mean.amax(-1) > SURE_WEIGHT).double(),
        ],
        -1,
    )


class UncertaintySummary:
    """Means of `Measure` by layer, position and kind of token.

    Sums alone are kept, whatever the length of the text.

    Args:
        cost_ratio: [E].
        kinds: index into `TokenKind` of every token id, int64 [V]; None where tokens are no text.
    """

    def __init__(self, cost_ratio: Tensor, kinds: Tensor | None = None):
        self.cost_ratio, self.kinds = cost_ratio, kinds
        self._position = torch.zeros(0)  # [L, T, M]
        self._kind = torch.zeros(0)  # [L, K, M]
        self._position_count = torch.zeros(0, dtype=torch.float64)
        self._kind_count = torch.zeros(len(TokenKind), dtype=torch.float64)

    def add(self, reading: Reading) -> "UncertaintySummary":
        """Take in a batch of windows, of any length."""
        # [L, B, T, M], the mean over units
        measured = measures(reading.concentration, self.cost_ratio).mean(3)
        L, B, T, M = measured.shape
        longer = T - len(self._position_count)
        if longer > 0:
            self._position_count = torch.cat(
                [self._position_count, torch.zeros(longer, dtype=torch.float64)]
            )
            grown = torch.zeros(L, len(self._position_count), M, dtype=torch.float64)
            grown[:, : T - longer] = self._position if longer < T else 0
            self._position = grown
        self._position[:, :T] += measured.sum(1)
        self._position_count[:T] += B
        if self.kinds is not None:
            kind = self.kinds[reading.tokens.cpu()].flatten()  # [B T]
            if self._kind.dim() == 1:
                self._kind = torch.zeros(L, len(TokenKind), M, dtype=torch.float64)
            self._kind.index_add_(1, kind, measured.flatten(1, 2))
            self._kind_count += torch.bincount(kind, minlength=len(TokenKind))
        return self

    @property
    def tokens(self) -> int:
        """How many were read."""
        return int(self._position_count.sum())

    def layers(self) -> pd.DataFrame:
        """One row a layer."""
        self.require_text()
        frame = pd.DataFrame(
            (self._position.sum(1) / self.tokens).numpy(), columns=[m.value for m in Measure]
        )
        frame.index.name = "layer"
        return frame

    def positions(self) -> pd.DataFrame:
        """One row a layer and position in the window."""
        self.require_text()
        return _long(
            self._position / self._position_count[:, None],
            "position",
            list(range(len(self._position_count))),
        )

    def kinds_frame(self) -> pd.DataFrame:
        """One row a layer and kind of token that the text has, with the share of tokens.

        Empty where tokens are no text.
        """
        self.require_text()
        if self.kinds is None:
            return pd.DataFrame(columns=["layer", "kind", "share", *(m.value for m in Measure)])
        frame = _long(
            self._kind / self._kind_count[:, None], "kind", [kind.value for kind in TokenKind]
        )
        frame["share"] = np.tile((self._kind_count / self.tokens).numpy(), len(self._kind))
        return frame[frame["share"] > 0].reset_index(drop=True)

    def require_text(self) -> None:
        """Raise a ValueError unless some text was read."""
        require(self.tokens > 0, "text", "at least one token", "an empty text", "read a text first")


def _long(values: Tensor, name: str, labels: Sequence[object]) -> pd.DataFrame:
    """[L, N, M] to a frame of L N rows."""
    L, N, M = values.shape
    frame = pd.DataFrame(values.reshape(L * N, M).numpy(), columns=[m.value for m in Measure])
    frame.insert(0, name, list(labels) * L)
    frame.insert(0, "layer", np.repeat(np.arange(L), N))
    return frame


def summarise_uncertainty(
    readings: Iterable[Reading], cost_ratio: Tensor, tokeniser: Tokeniser | None = None
) -> UncertaintySummary:
    """Read a text to its end; ValueError if there is none."""
    summary = UncertaintySummary(
        cost_ratio, None if tokeniser is None else kinds_of_vocabulary(tokeniser)
    )
    for reading in readings:
        summary.add(reading)
    summary.require_text()
    return summary
