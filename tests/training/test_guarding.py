import pytest
import torch

from bayes_router.data.tokens import Batch
from bayes_router.routing.guard import Guard
from bayes_router.routing.policy import Budget, Conservative, policy_from_dict, policy_to_dict
from bayes_router.training.evidence import fit_evidence
from bayes_router.training.executed import execute
from bayes_router.training.guarding import set_guard
from bayes_router.transformer.generate import Sampling, generate
from bayes_router.types import RoutingMode
from tests.tiny import EXPERTS, tiny_model

COST, FULL = torch.tensor([1.0, 0.15, 0.3, 0.2]), EXPERTS.index("full")


def text(low: int, high: int, seed: int, rows: int = 40, T: int = 120) -> torch.Tensor:
    return torch.randint(low, high, (rows, T), generator=torch.Generator().manual_seed(seed))


def batches(tokens: torch.Tensor) -> list[Batch]:
    return [Batch(part, part) for part in tokens.split(10)]


@pytest.fixture(scope="module")
def model():
    """Its evidence and its guard know ids below 12."""
    found = tiny_model().eval()
    found.policy = Budget(tuple(COST.tolist()), 0.5)
    fit_evidence(found, batches(text(0, 12, 0)), torch.full((3,), 0.5), memory=16)
    set_guard(found, found.controller, batches(text(0, 12, 1)), COST, FULL)
    return found


def cost(model, tokens, policy) -> float:
    return execute(model, batches(tokens), COST, RoutingMode.HARD, policy, 0.0).reading.cost


def test_a_planted_shift_takes_the_refuge_and_text_like_the_fits_costs_a_hundredth_more(model):
    guard = model.policy
    bare = Budget(guard.cost_ratio, guard.price)
    same = text(0, 12, 2, rows=100)
    assert guard.price == 0.5 and cost(model, same, bare) < 0.6
    assert cost(model, same, bare) <= cost(model, same, guard) <= 1.015 * cost(model, same, bare)
    other = text(12, 23, 3)
    route = model(other).route
    assert cost(model, other, bare) < 0.6 and (route[:, :, 60:] == FULL).float().mean() > 0.95
    mixed = torch.cat([same[:10], other[:10], same[10:30:2], same[10:30:2]], 1)
    alarmed = (model(mixed).route == FULL).float().mean((0, 1, 3))
    assert alarmed[180:240].mean() > 0.9 > 0.6 > alarmed[400:].mean()  # on in the middle, off again


def test_no_alarm_depends_on_later_tokens(model):
    tokens = text(0, 12, 4, rows=4)
    changed = tokens.clone()
    changed[:, 70:] = 15
    before, after = model(tokens).route, model(changed).route
    assert torch.equal(before[:, :, :70], after[:, :, :70]) and not torch.equal(
        before[:, :, 70:], after[:, :, 70:]
    )


def test_decoding_decides_as_one_pass_does_rows_of_different_lengths_and_reordered(model):
    rows = [text(0, 23, 5, 1, 50)[0], text(12, 23, 6, 1, 31)[0]]
    out, routes = generate(model, rows, 30, Sampling(seed=1))
    for b, row in enumerate(rows):
        whole = out[b, : len(row) + 29][None]
        assert torch.equal(model(whole).route[:, 0, len(row) - 1 :], routes[:, b])
    cache = model.network.new_cache(2, 100)
    both = torch.stack([text(0, 12, 7, 1, 40)[0], text(12, 23, 8, 1, 40)[0]])
    model(both, cache=cache)
    cache.reorder(torch.tensor([1, 0]))
    step = model(both[:, -1:].flip(0), cache=cache).route
    assert torch.equal(step, model(torch.cat([both, both[:, -1:]], 1)).route[:, :, -1:].flip(1))
    cache.reset()
    assert torch.equal(model(both, cache=cache).route, model(both).route)


def test_a_past_that_was_not_seen_is_a_reason_for_the_refuge(model):
    cache, guard = model.network.new_cache(1, 100), model.policy
    model.policy = Budget(guard.cost_ratio, guard.price)
    try:
        model(text(0, 12, 7, 1, 40), cache=cache)
    finally:
        model.policy = guard
    assert (model(text(0, 12, 8, 1, 1), cache=cache).route == FULL).all()


def test_two_levels_keep_an_alarm_on_between_them_and_padding_is_no_token():
    guard = Guard((1.0, 0.3), 0, (0.0,), (-2.0,), (-1.0,), memory=1)
    log = torch.tensor([[0.0, -1.5, -3.0, -1.5, -1.5, -0.5, -1.5]])
    alarm, state = guard.alarm(0, log)
    assert alarm.tolist() == [[False, False, True, True, True, False, False]]
    assert guard.alarm(0, log[:, 3:5], guard.alarm(0, log[:, :3])[1])[0].tolist() == [[True, True]]
    real = torch.ones(1, 14, dtype=torch.bool)
    real[:, :4] = real[:, 9:12] = False
    for usual in (0.0, 100.0):  # what stands on padding is far above one level, below the other
        slow = Guard((1.0, 0.3), 0, (usual,), (usual - 2,), (usual,), memory=20)
        shifted = log + usual
        padded = torch.full((1, 14), -50.0).masked_scatter(real, shifted)
        found, expected = slow.alarm(0, padded, real=real), slow.alarm(0, shifted)
        assert torch.equal(found[0][real], expected[0][0])
        torch.testing.assert_close(found[1], expected[1])


def test_more_confidence_leaves_a_wider_margin_to_what_is_spent(model):
    """The bound is above the mean; at a confidence of a half it is the mean."""
    guard, found = model.policy, {}
    try:
        for confidence in (0.5, 0.999):
            model.policy = Budget(guard.cost_ratio, guard.price)
            windows = batches(text(0, 12, 1))
            found[confidence] = set_guard(
                model, model.controller, windows, COST, FULL, 0.05, confidence
            )
    finally:
        model.policy = guard
    assert found[0.999].share < found[0.5].share
    # of what is executed: a token on the refuge may raise alarms in later layers
    executed = found[0.5].cost / found[0.5].bare - 1
    assert found[0.5].bound == pytest.approx(executed, abs=1e-6) and executed > 0.01
    assert found[0.999].cost / found[0.999].bare - 1 < 0.9 * found[0.999].bound <= 0.045


def test_a_guard_is_saved_as_other_policies_are(model):
    assert policy_from_dict(policy_to_dict(model.policy)) == model.policy


def test_what_no_guard_can_be_set_by(model):
    windows = batches(text(0, 12, 1))
    with pytest.raises(ValueError, match="evidence: expected a density"):
        set_guard(tiny_model(), tiny_model().controller, windows, COST, FULL)
    with pytest.raises(
        ValueError, match="spend: expected a share of cost between 0 and 1; got 1.0"
    ):
        set_guard(model, model.controller, windows, COST, FULL, spend=1.0)
    with pytest.raises(
        ValueError, match="confidence: expected a probability between 0 and 1; got 0"
    ):
        set_guard(model, model.controller, windows, COST, FULL, confidence=0)
    with pytest.raises(ValueError, match="texts: expected at least 8 windows; got 3"):
        set_guard(model, model.controller, [Batch(*[text(0, 12, 1)[:3]] * 2)], COST, FULL)
    without = tiny_model()
    without.policy = model.policy
    with pytest.raises(ValueError, match="policy: expected evidence beside a guard"):
        without(text(0, 12, 1)[:1])
    other = tiny_model()
    other.controller.evidence, other.policy = (
        model.controller.evidence,
        Conservative(tuple(COST.tolist())),
    )
    with pytest.raises(ValueError, match="policy: expected argmax, a budget or a guard"):
        set_guard(other, other.controller, windows, COST, FULL)
    with pytest.raises(ValueError, match="policy.release: expected at least the level"):
        Guard((1.0, 0.3), 0, (0.0,), (-1.0,), (-2.0,))
