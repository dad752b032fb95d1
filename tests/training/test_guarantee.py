import itertools
import math

import numpy as np
import pytest
import torch

from bayes_router.data.tokens import Batch
from bayes_router.routing.policy import at_price
from bayes_router.training.executed import Executed
from bayes_router.training.guarantee import (
    PRICES,
    Guarantee,
    cheaper_from,
    keep_promise,
    later_windows,
    promise,
    strongest_single,
    upper_bound,
    windows_needed,
)
from tests.tiny import EXPERTS, tiny_batch, tiny_model

LOST, T = 0.005, 256
PRICES_HERE = tuple(range(20))


def executed(price: float, cost: float, nll: np.ndarray) -> Executed:
    scored = torch.full((len(nll),), float(T), dtype=torch.float64)
    return Executed(price, cost, torch.zeros(1, 2), torch.from_numpy(nll) * T, scored)


class Pool:
    """Windows whose expected excess under each policy is known.

    It grows with the price, and is skewed as real ones are.
    """

    def __init__(self, scale: float = 1.0):
        self.mean = scale * 0.0007 * np.array(PRICES_HERE)  # nats per token
        self.cost = 1 - 0.04 * np.array(PRICES_HERE)

    def calibrate(self, windows: int, seed: int, confidence: float = 0.95) -> Guarantee:
        random = np.random.default_rng(seed)
        base = random.normal(1.3, 0.2, windows)
        unit = random.gamma(2.0, 0.5, windows)  # of mean 1, the same windows for every policy
        noise = random.normal(0, 0.002, (len(PRICES_HERE), windows))

        def read(price: float) -> Executed:
            index = int(price)
            excess = self.mean[index] * unit + noise[index] * (index > 0)
            return executed(price, self.cost[index], base + excess)

        return keep_promise(read, executed(math.nan, 1.0, base), LOST, confidence, PRICES_HERE)


def outcomes(pool: Pool, truth: Pool, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Share of calibrations that keep the promise on text of `truth`.

    And the mean cost relative to the best in hindsight.
    """
    kept, costs = [], []
    allowed = math.log1p(LOST)
    hindsight = truth.cost[truth.mean <= allowed].min()
    for seed in range(trials):
        found = pool.calibrate(60, seed, confidence)
        kept.append(truth.mean[int(found.kept.price)] <= allowed)
        costs.append(found.kept.cost / hindsight)
    return float(np.mean(kept)), float(np.mean(costs))


def test_the_promise_is_kept_in_the_stated_share_at_nearly_the_cost_of_hindsight():
    kept, cost = outcomes(Pool(), Pool(), 200)
    tolerance = 0.95 - 1.64 * (0.95 * 0.05 / 200) ** 0.5
    assert kept >= tolerance and cost <= 1.10
    # the quantile of another confidence breaks it
    wrong, _ = outcomes(Pool(), Pool(), 200, confidence=0.5)
    assert wrong < tolerance - 0.02


def test_under_a_shift_of_kind_the_promise_does_not_hold():
    kept, _ = outcomes(Pool(), Pool(scale=3.0), 50)
    assert kept < 0.2


def test_a_hump_between_full_attention_and_the_posteriors_choice_is_no_obstacle():
    """As on real text: prices that make full attention cheap lose more than the choice itself."""
    prices = (-40.0, -4.0, -1.0, *map(float, PRICES_HERE))
    mean = dict(zip(prices, (0.0, 0.001, 0.006, *Pool().mean), strict=True))
    cost = dict(zip(prices, (1.0, 0.9, 0.8, *(0.7 - 0.02 * np.array(PRICES_HERE))), strict=True))
    allowed, kept, costs = math.log1p(LOST), [], []

    def calibrate(seed: int, shift: float = 0.0) -> Guarantee:
        random = np.random.default_rng(seed)
        unit, noise = random.gamma(2.0, 0.5, 60), random.normal(0, 0.002, 60)
        base = np.full(60, 1.3)

        def read(price: float) -> Executed:
            more = mean[price] + shift * (price >= 0)
            return executed(price, cost[price], base + more * unit + noise * (price > -40))

        return keep_promise(read, executed(math.nan, 1.0, base), LOST, 0.95, prices)

    for seed in range(200):
        found = calibrate(seed).kept
        kept.append(mean[found.price] <= allowed)
        costs.append(found.cost)
    best = min(cost[p] for p in prices if mean[p] <= allowed)
    tolerance = 0.95 - 1.64 * (0.95 * 0.05 / 200) ** 0.5
    assert np.mean(kept) >= tolerance and np.mean(costs) <= 1.10 * best
    # where price 0 breaks the promise, what is stronger is tried, from full attention on
    late = [calibrate(seed, shift=0.01).kept.price for seed in range(50)]
    assert set(late) == {-4.0}


def test_two_sequences_share_the_error():
    """Noise alone: of two sequences of broken promises about one in twenty is taken for kept."""
    allowed, wrong = math.log1p(LOST), 0

    def calibrate(seed: int) -> bool:
        random = np.random.default_rng(seed)
        nll = {price: 1.3 + random.normal(allowed, 0.004, 40) for price in (-1.0, 0.0)}
        nll[-2.0] = base = np.full(40, 1.3)
        try:
            keep_promise(
                lambda price: executed(price, -price / 2, nll[price]),
                executed(math.nan, 1.0, base), LOST, 0.8, (-2.0, -1.0, 0.0),
            )  # fmt: skip
        except ValueError:
            return False
        return True

    wrong = sum(calibrate(seed) for seed in range(500))
    assert wrong / 500 == pytest.approx(0.2, abs=0.05)  # with the whole of it each: 0.36


def test_the_bound_is_students():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert upper_bound(x, 0.95) == pytest.approx(1.5 + 2.3534 * x.std().item() / 2, abs=1e-3)
    needed = windows_needed(x / 1000, 0.003, 0.95)
    more = torch.cat([x / 1000] * (needed // 4 + 1))
    assert upper_bound(more, 0.95) <= 0.003 < upper_bound(x / 1000, 0.95)


def test_trials_stop_at_the_first_failure_whatever_comes_after():
    asked = []

    def read(price: float) -> Executed:
        asked.append(price)
        return executed(price, 1 - 0.1 * price, np.full(20, 1.3 + (0.01 if price == 2 else 0.0)))

    found = keep_promise(read, executed(math.nan, 1.0, np.full(20, 1.3)), LOST, 0.95, (0, 1, 2, 3))
    assert found.kept.price == 1 and asked == [0, 1, 2] and "20 windows" in str(found)
    assert found.refused is not None and found.refused.price == 2 and found.needed == -1
    assert "the next, price 2 at a cost of 0.8000, lost +0.0101, at most +0.0101: too much" in str(
        found
    )


def test_it_is_said_how_many_windows_a_cheaper_policy_would_take():
    pool = Pool()
    few = pool.calibrate(20, seed=1)
    assert few.refused is not None and few.refused.price == few.kept.price + 1
    assert f"about {few.needed} windows would tell" in str(few) and few.needed > 20
    # so many more of the same tell: what was refused is kept to
    base = np.full(20, 1.3)
    nll = base + np.resize([0.0, 0.008], 20)

    def promised(times: int) -> Guarantee:
        both = {p: np.resize(nll if p == 2 else base, 20 * times) for p in (0, 1, 2)}
        return keep_promise(
            lambda price: executed(price, 1 - 0.1 * price, both[price]),
            executed(math.nan, 1.0, both[0]), LOST, 0.95, (0, 1, 2),
        )  # fmt: skip

    needed = promised(1).needed
    assert promised(1).kept.price == 1 and 20 < needed < 200
    assert promised(math.ceil(needed / 20)).kept.price == 2


def test_prices_are_fine_where_a_policy_is_cheaper_than_its_own_choice():
    ratios = [b / a for a, b in itertools.pairwise(PRICES) if a > 0][:-1]
    assert max(ratios) < 1.27 and len([p for p in PRICES if p < 0]) < 15
    assert list(PRICES) == sorted(PRICES) and 0.0 in PRICES


def test_too_few_windows_are_refused_with_how_many_it_would_take():
    base = np.full(10, 1.3)
    noisy = base + np.random.default_rng(0).normal(0.001, 0.02, 10)

    def read(price: float) -> Executed:
        return executed(price, 1.0 if price < 0 else 0.5, base if price < 0 else noisy)

    with pytest.raises(
        ValueError, match=r"texts: expected about \d+ windows to promise a loss of 0.005 .* got 10"
    ):
        keep_promise(read, executed(math.nan, 1.0, base), LOST, 0.95, (-1, 0))
    with pytest.raises(ValueError, match="texts: expected at least 8 windows; got 3"):
        keep_promise(read, executed(math.nan, 1.0, base[:3]), LOST)


@pytest.mark.parametrize(
    ("lost", "confidence", "message"),
    [
        (0.005, 1.0, "confidence: expected a probability between 0 and 1; got 1.0"),
        (0.0, 0.95, "quality: expected a share of perplexity above 0"),
        (0.001, 0.95, "quality: expected a loss that the strongest policy meets; got 0.001"),
    ],
)
def test_what_cannot_be_promised(lost, confidence, message):
    base = np.full(20, 1.3)
    with pytest.raises(ValueError, match=message):
        keep_promise(
            lambda price: executed(price, 1.0, base + 0.1), executed(0, 1.0, base), lost, confidence
        )


def test_a_promise_by_executed_passes():
    model = tiny_model().eval()
    windows = [Batch(*tiny_batch(B=8, T=24))]
    cost = torch.tensor([1.0, 0.15, 0.3, 0.2])
    family, full, policy = at_price("argmax", cost.tolist()), EXPERTS.index("full"), model.policy
    found = promise(model, windows, cost, family, full, 0.5, prices=PRICES[::8])
    assert model.policy is policy and found.windows == 8
    assert found.tried[0].price >= 0  # the prices from 0 on come first
    assert found.kept.cost < 1 and found.kept.bound <= 0.5
    alone = promise(model, windows, cost, family, full, 50.0, prices=PRICES[:5])
    first = alone.tried[0]
    # every token on the reference
    assert first.price == PRICES[0] and first.cost == 1 and first.lost == 0
    again = promise(model, windows, cost, family, full, 0.5, prices=cheaper_from(0.0)[::8])
    assert again.tried[0].price == 0.0 and all(t.price >= 0 for t in again.tried)
    best = strongest_single(model, windows, cost)
    losses = []
    for name in EXPERTS:
        logits = torch.cat([model(b.tokens, force=name).logits.detach() for b in windows]).flatten(
            0, 1
        )
        losses.append(
            float(
                torch.nn.functional.cross_entropy(
                    logits, torch.cat([b.targets for b in windows]).flatten()
                )
            )
        )
    assert best == int(np.argmin(losses))


def test_what_is_promised_by_is_not_what_was_read_before(corpus):
    from bayes_router.data.load import load_data
    from tests.tiny import fit_config

    valid = load_data(fit_config(corpus))[1].valid
    early = torch.cat([b.tokens for b in valid.windows(32, 4, 300)])
    late = torch.cat([b.tokens for b in later_windows(valid, 32, 4, 300, 256)])
    everything = torch.cat([b.tokens for b in valid.windows(32, 4, 4096)])
    assert len(late) == 8 and torch.equal(late, everything[12:20]) and len(early) <= 12
    with pytest.raises(ValueError, match="texts: expected more than"):
        later_windows(valid, 32, 4, 10**9, 256)


def test_a_loss_is_of_scored_tokens_not_of_windows():
    """A window with a hundredth of the tokens counts a hundredth: its excess is 1 nat a token."""
    scored = torch.tensor([1.0] * 8 + [100.0] * 8, dtype=torch.float64)
    zero = torch.zeros(16, dtype=torch.float64)
    lost = torch.where(scored == 1, scored, 0.0)
    load = torch.zeros(1, 2)
    found = keep_promise(
        lambda price: Executed(price, 0.5, load, lost, scored),
        Executed(0.0, 1.0, load, zero, scored),
        0.05,
        prices=(0.0,),
    )
    assert found.kept.lost == pytest.approx(math.expm1(8 / 808))
