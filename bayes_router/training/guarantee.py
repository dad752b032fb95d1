"""The cheapest policy whose expected loss is bounded with a stated confidence.

The loss is over a reference.

Learn then Test (arXiv 2110.01052) by fixed sequences: policies are tried from the stronger to the
cheaper, in an order and at prices that no text decided, and the last before the first that cannot
be told from a broken promise is kept. That needs no correction for having tried several. There are
two sequences, from the posterior's own choice (price 0) on, and, where that breaks the promise,
from full attention towards it; they share the probability of an error. One sequence through both
would have to pass prices that make full attention cheap, at which tokens go to it that were never
meant to: between full attention and price 0 the loss has a hump. The test is Student's t over
windows, of the mean excess of nats per token.

It holds for windows exchangeable with those that it was read on: text of the same kind, of the same
length, in the same order of magnitude of number. It says nothing of text of another kind; that is
what evidence is for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.checks import between, require
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.routing.policy import Policy
from bayes_router.training.dial import STEEPEST
from bayes_router.training.executed import CountedCost, Executed, Routed, execute
from bayes_router.types import RoutingMode

STEP = 2 ** (1 / 3)
PRICES = (
    -STEEPEST,
    *(-0.05 * STEP ** (3 * i) for i in range(11, -1, -1)),
    0.0,
    *(0.05 * STEP**i for i in range(35)),
    STEEPEST,
)
"""Nats per unit of cost, from every token on the costliest expert to every token on the cheapest.

Fixed before any text. Those that make full attention cheaper than it is are few: what is looked for
lies above 0, and there a step is to cost little.
"""
FIRST = 0.9
"""Share of the probability of an error that the sequence from price 0 on has."""
LEAST_WINDOWS = 8


class Tested(NamedTuple):
    """One policy against the promise; shares of perplexity."""

    price: float
    cost: float  # executed, full attention = 1
    lost: float  # mean over the windows
    bound: float  # that the expected loss stays below with the confidence


class Guarantee(NamedTuple):
    """A policy that keeps the promise, and what was read for it."""

    kept: Tested
    lost: float  # promised
    confidence: float
    windows: int
    tried: tuple[Tested, ...]
    refused: Tested | None = None  # the first that could not be told from a broken promise
    needed: int = -1  # about how many windows it would take to keep to that; -1: none would do

    def __str__(self) -> str:
        return (
            f"quality {self.lost:g}: price {self.kept.price:.4g}, executed cost "
            f"{self.kept.cost:.4f}; lost "
            f"{self.kept.lost:+.4f} of perplexity, at most {self.kept.bound:+.4f} with confidence "
            f"{self.confidence:g} "
            f"({self.windows} windows, {len(self.tried)} policies kept to it)\n{self._cheaper()}"
            "holds for windows exchangeable with these: text of this kind and length, no other"
        )

    def _cheaper(self) -> str:
        """What stands between the policy and the next cheaper one."""
        if self.refused is None:
            return ""
        price, cost, lost, bound = self.refused
        said = f"the next, price {price:.4g} at a cost of {cost:.4f}, lost {lost:+.4f}, at most "
        more = f"about {self.needed} windows would tell" if self.needed > 0 else "too much"
        return f"{said}{bound:+.4f}: {more}\n"


def upper_bound(excess: Tensor, confidence: float) -> float:
    """What the mean of windows like these [W] stays below, with that confidence, by Student's t."""
    W = len(excess)
    from scipy import stats  # where a promise is tested, not where an evaluation is read

    quantile = float(stats.t.ppf(confidence, W - 1))
    return float(excess.mean() + quantile * excess.std() / W**0.5)


def windows_needed(excess: Tensor, allowed: float, confidence: float) -> int:
    """About how many windows would bring `upper_bound` to `allowed`.

    Mean and deviation are taken as those of `excess` [W].
    """
    room = allowed - float(excess.mean())
    return (
        math.ceil((NormalDist().inv_cdf(confidence) * float(excess.std()) / room) ** 2) + 2
        if room > 0
        else -1
    )


def check_promise(lost: float, confidence: float) -> None:
    """Refuse what nobody can promise: see `keep_promise`."""
    between("confidence", confidence, "a probability between 0 and 1")
    share = isinstance(lost, Real) and 0 < lost < math.inf
    fix = "half a percent is 0.005"
    require(share, "quality", "a share of perplexity above 0", lost, fix)


def keep_promise(
    read: Callable[[float], Executed],
    reference: Executed,
    lost: float,
    confidence: float = 0.95,
    prices: Sequence[float] = PRICES,
) -> Guarantee:
    """Try policies in order until one fails; the last that did not.

    Args:
        read: price -> what its policy did on the calibration windows; called until one fails.
        reference: what the loss is measured from, on the same windows.
        lost: share of perplexity that may be lost: exp(nats per token more) - 1.
        confidence: with which the promise is kept.
        prices: ascending, decided before any of the text was read. Those from 0 on are tried first,
            those below where 0 fails.

    Raises:
        ValueError: a level outside (0, 1), too few windows to say anything (with how many it would
            take), or a quality that the first policy does not meet.
    """
    check_promise(lost, confidence)
    W = len(reference.window_nll)
    require(W >= LEAST_WINDOWS, "texts", f"at least {LEAST_WINDOWS} windows", W, "give more text")
    cheap, strong = [p for p in prices if p >= 0], [p for p in prices if p < 0]
    error, share = 1 - confidence, FIRST if cheap and strong else 1.0
    first = _Sequence.of(read, reference, lost, cheap, 1 - error * share)
    if first.tried or not strong:
        found = first
    else:
        error *= 1 - FIRST if cheap else 1.0
        found = _Sequence.of(read, reference, lost, strong, 1 - error)
    # full attention keeps every promise: where cheaper was asked for, it alone says nothing
    asked = found is first or not (cheap or found.refused)
    if found.tried and (asked or found.tried[-1].cost < found.tried[0].cost):
        kept = found.tried[-1]
        return Guarantee(kept, lost, confidence, W, found.tried, found.refused, found.needed)
    refused, needed = found.refused or first.refused, max(found.needed, first.needed)
    assert refused is not None
    if needed > 0:
        raise ValueError(
            f"texts: expected about {needed} windows to promise a loss of {lost:g} at confidence "
            f"{confidence:g}; got {W}, on which {refused.lost:.4f} was lost, at most "
            f"{refused.bound:.4f}; give more text, or promise less"
        )
    raise ValueError(
        f"quality: expected a loss that the strongest policy meets; got {lost:g}, and that loses "
        f"{refused.lost:.4f} at a cost of {refused.cost:.3f}; promise less"
    )


class _Sequence(NamedTuple):
    """Policies that kept to a promise, in the order of trial, and what ended the trials."""

    tried: tuple[Tested, ...]
    refused: Tested | None
    needed: int

    @classmethod
    def of(
        cls,
        read: Callable[[float], Executed],
        reference: Executed,
        lost: float,
        prices: Sequence[float],
        confidence: float,
    ) -> "_Sequence":
        """Try until one cannot be told from a broken promise."""
        W, allowed = len(reference.window_nll), math.log1p(lost)
        tried: list[Tested] = []
        for price in prices:
            reading = read(price)
            more = reading.window_nll - reference.window_nll
            excess = more * W / reference.window_scored.sum()
            mean, bound = float(excess.mean()), upper_bound(excess, confidence)
            shown = Tested(price, reading.cost, math.expm1(mean), math.expm1(bound))
            if bound > allowed:
                return cls(tuple(tried), shown, windows_needed(excess, allowed, confidence))
            tried.append(shown)
        return cls(tuple(tried), None, -1)


@dataclass(frozen=True)
class Single:
    """Every token on one expert: what a loss is measured from."""

    index: int

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        return torch.full(concentration.shape[:-1], self.index, device=concentration.device)


def promise(
    model: Routed,
    windows: Sequence[Batch],
    cost: Tensor | CountedCost,
    family: Callable[[float], Policy],
    reference: int,
    lost: float,
    confidence: float = 0.95,
    prices: Sequence[float] = PRICES,
) -> Guarantee:
    """`keep_promise` by executed passes over calibration windows.

    Neither fit nor search has seen them.

    Args:
        model: a fitted model or a patched one; its policy is as before afterwards.
        windows: of the text.
        cost: [E] or [L, E], full = 1.
        family: price -> policy.
        reference: index of the expert that takes every token in the pass that the loss is measured
            from.
        lost: see `keep_promise`.
        confidence: idem.
        prices: idem.
    """
    check_promise(lost, confidence)  # before anything is read

    def read(policy: Policy, price: float) -> Executed:
        return execute(model, windows, cost, RoutingMode.HARD, policy, price).reading

    base = read(Single(reference), math.nan)
    return keep_promise(lambda price: read(family(price), price), base, lost, confidence, prices)


def strongest_single(model: Routed, windows: Sequence[Batch], cost: Tensor) -> int:
    """The expert that loses least where it takes every token.

    The strongest static choice of a run from scratch.
    """
    found = [
        execute(model, windows, cost, RoutingMode.HARD, Single(index), math.nan).reading.nll
        for index in range(cost.shape[-1])
    ]
    return min(range(len(found)), key=found.__getitem__)


def cheaper_from(start: float) -> tuple[float, ...]:
    """The prices of `PRICES` from `start` on.

    A run from scratch was trained at 0, and full attention may be no good there.
    """
    return tuple(price for price in PRICES if price >= start)


def later_windows(
    source: TokenSource, context: int, batch_size: int, skip: int, limit: int
) -> list[Batch]:
    """At most `limit` tokens of windows after the first `skip` tokens of a source.

    What was read there promises nothing.

    Raises:
        ValueError: there is no text so late.
    """
    past = -(-skip // (context * batch_size))
    batches = source.windows(context, batch_size, past * context * batch_size + limit)
    found = list(islice(batches, past, None))
    require(
        len(found) > 0,
        "texts",
        f"more than {skip} tokens of held-out text",
        "none so late",
        "lower --tokens",
    )
    return found
