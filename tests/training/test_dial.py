"""The dial meets its budget on executed routes and refuses what no price reaches.

It leaves the model as it was.
"""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.data.recall import RecallData
from bayes_router.data.tokenisers import ByteTokeniser
from bayes_router.data.tokens import TokenDataset
from bayes_router.routing.policy import Argmax, Budget, Conservative, at_price
from bayes_router.training.dial import BudgetUnreachable, Dial, solve_price
from bayes_router.training.executed import Executed, read_routes
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import IGNORED, RoutingMode
from tests.tiny import tiny_model as tiny

COSTS = (1.0, 0.15, 0.3, 0.2)
READ = {"context": 40, "batch_size": 32}


# In layer 0 all tokens of one id share one posterior, and change expert at one price: many ids, so
# that no jump is large.
tiny_model = functools.partial(tiny, vocab_size=256)


def source(length: int = 700) -> TokenDataset:
    text = bytes(torch.randint(256, (length,), generator=torch.Generator().manual_seed(0)).tolist())
    return TokenDataset([text], ByteTokeniser())


def executed_cost(
    model: RoutedLanguageModel, text: TokenDataset, policy: Budget | Conservative
) -> float:
    """By hand: every window through the model under the policy.

    Counted is the cost of each token's own expert.
    """
    model.policy = policy
    cost = torch.tensor(policy.cost_ratio, dtype=torch.float64)
    with torch.no_grad():
        paid = [cost[model(batch.tokens).route].flatten() for batch in text.windows(40, 32)]
    model.policy = Argmax()
    return float(torch.cat(paid).mean())


@pytest.mark.parametrize("budget", [0.16, 0.25, 0.4, 0.7, 0.9])
def test_budget_is_met_on_executed_routes(budget: float) -> None:
    model, text = tiny_model(), source()
    reading = solve_price(model, text, COSTS, budget, **READ)
    assert abs(reading.cost - budget) <= 0.005
    assert reading.cost == pytest.approx(
        executed_cost(model, text, Budget(COSTS, reading.price)), abs=1e-9
    )


def test_budget_is_met_by_the_conservative_policy_too() -> None:
    model, text = tiny_model(), source()
    reading = solve_price(
        model, text, COSTS, 0.5, policy=at_price("conservative", COSTS, threshold=0.8), **READ
    )
    by_hand = executed_cost(model, text, Conservative(COSTS, 0.8, price=reading.price))
    assert abs(by_hand - 0.5) <= 0.005
    assert reading.cost == pytest.approx(by_hand, abs=1e-9)


def test_the_ends_are_one_expert_for_all() -> None:
    dial = Dial(tiny_model(), source(200), COSTS, **READ)
    most, least = dial.solve(1.0, 1e-6), dial.solve(0.15, 1e-6)
    assert most.price < 0 < least.price
    assert torch.equal(most.load[:, 0], torch.ones(3, dtype=torch.float64))
    assert torch.equal(least.load[:, 1], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("budget", [0.1, 1.01, -1.0, float("nan")])
def test_a_budget_outside_the_experts_is_refused_with_the_range(budget: float) -> None:
    with pytest.raises(ValueError, match=r"expected a cost from 0\.150 .* to 1\.000"):
        Dial(tiny_model(), source(), COSTS, **READ).solve(budget)


def test_a_collapsed_posterior_jumps_and_says_so() -> None:
    model = tiny_model()
    for controller in model.controller.layers:
        torch.nn.init.zeros_(controller.out.weight)  # type: ignore[union-attr, arg-type]
    dial = Dial(model, source(400), COSTS, **READ)
    with pytest.raises(BudgetUnreachable, match=r"in a jump: .* from 1\.000 to 0\.150") as refused:
        dial.solve(0.5)
    assert refused.value.nearest is not None and refused.value.nearest.cost == pytest.approx(0.15)
    curve = dial.curve((0.15, 0.5, 1.0))
    assert curve["met"].tolist() == [True, False, True]
    assert curve["cost"].tolist() == pytest.approx([0.15, 0.15, 1.0])


def test_curve_has_a_row_for_each_budget_within_reach() -> None:
    dial = Dial(tiny_model(), source(), COSTS, **READ)
    curve = dial.curve((0.05, 0.2, 0.5, 1.0))
    assert curve["budget"].tolist() == [0.2, 0.5, 1.0]
    assert (curve["cost"] - curve["budget"]).abs().max() <= 0.005
    assert curve["price"].is_monotonic_decreasing
    loads = curve[[c for c in curve if c.startswith("load ")]]
    assert loads.sum(axis=1).tolist() == pytest.approx([1.0] * 3)
    assert len(dial.readings) < 20  # passes are shared between budgets


def test_reading_by_hand_and_the_model_is_left_as_it_was() -> None:
    model, text = tiny_model().train(), source()
    usual = model.policy
    reading = read_routes(
        model, text, torch.tensor(COSTS), policy=Budget(COSTS, 1.0), limit=400, **READ
    )
    assert model.training and model.policy is usual
    tokens, targets = next(text.windows(40, 10, 400))
    model.eval().policy = Budget(COSTS, 1.0)
    with torch.no_grad():
        out = model(tokens)
    assert reading.nll == pytest.approx(
        float(F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())), rel=1e-5
    )
    torch.testing.assert_close(reading.load, F.one_hot(out.route, 4).double().mean((1, 2, 3)))
    assert reading.cost == pytest.approx(float(torch.tensor(COSTS)[out.route].mean()), rel=1e-5)
    with pytest.raises(ValueError, match="cost_ratio: expected one number for each of 4 experts"):
        read_routes(model, text, torch.ones(3), **READ)


def test_a_drawn_reading_has_soft_loads_and_leaves_the_generator() -> None:
    model, text = tiny_model(), source(400)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (
        read_routes(model, text, torch.tensor(COSTS), mode=RoutingMode.SAMPLE, **READ)
        for _ in range(2)
    )
    assert torch.equal(torch.rand(1), expected)
    assert first.nll == second.nll
    torch.testing.assert_close(first.load.sum(-1), torch.ones(3, dtype=torch.float64))


def test_unscored_targets_do_not_count() -> None:
    recall = RecallData()
    model = tiny(vocab_size=recall.vocab_size)
    reading = read_routes(
        model,
        recall,
        torch.tensor(COSTS),
        context=recall.min_context,
        batch_size=4,
        limit=recall.min_context,
    )
    batch = next(recall.windows(recall.min_context, 4, recall.min_context))
    assert float(reading.window_scored.sum()) == int((batch.targets != IGNORED).sum()) > 0
    with torch.no_grad():
        logits = model.eval()(batch.tokens).logits
    assert reading.nll == pytest.approx(
        float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())), rel=1e-5
    )


def test_paired_difference_by_hand() -> None:
    def reading(*nll: float) -> Executed:
        sums: Tensor = torch.tensor(nll, dtype=torch.float64)
        return Executed(0.0, 0.5, torch.ones(1, 1), sums * 10, torch.full_like(sums, 10))

    difference, error = reading(1.0, 2.0, 6.0).nll_above(reading(1.0, 1.0, 4.0))
    assert difference == pytest.approx(1.0)
    assert error == pytest.approx(1 / 3**0.5)  # the differences 0, 1, 2 have standard deviation 1


LAYER_COSTS = ((1.0, 0.15, 0.3, 0.2), (0.4, 0.15, 0.3, 0.2), (1.0, 0.15, 0.3, 0.2))


@pytest.mark.parametrize("budget", [0.16, 0.5, 0.79])
def test_layers_that_differ_in_cost_and_a_cost_that_is_counted(budget: float) -> None:
    """A table [L, E], and a function of the routes that says the same: the same price."""
    model, text, table = tiny_model(), source(), torch.tensor(LAYER_COSTS, dtype=torch.float64)

    def counted(routes: Tensor) -> float:
        assert routes.dim() == 4
        return float(table.gather(1, routes.flatten(1)).mean())

    family = at_price("argmax", COSTS)
    first, second = (
        Dial(model, text, cost, policy=family, **READ).solve(budget) for cost in (table, counted)
    )
    assert abs(first.cost - budget) <= 0.005 and first.price == second.price
    assert second.cost == pytest.approx(first.cost, abs=1e-12)
    model.policy = family(first.price)
    with torch.no_grad():
        routes = torch.cat([model(batch.tokens).route for batch in text.windows(40, 32)], 1)
    assert first.cost == pytest.approx(counted(routes), abs=1e-12)
    with pytest.raises(BudgetUnreachable, match=r"from 0\.150 .* to 0\.800"):
        Dial(model, text, counted, policy=family, **READ).solve(0.9)
    with pytest.raises(ValueError, match="policy: expected one, where layers differ"):
        Dial(model, text, table, **READ)


def test_few_passes_are_executed() -> None:
    """The posteriors of the last pass foresee the price.

    A jump is found at once, a smooth cost in a few passes.
    """
    text, model = source(), tiny_model()
    for budget in (0.16, 0.3, 0.5, 0.7, 0.9, 1.0):
        dial = Dial(model, text, COSTS, **READ)
        dial.solve(budget)
        assert len(dial.readings) <= 8
    for controller in model.controller.layers:
        torch.nn.init.zeros_(controller.out.weight)  # type: ignore[union-attr, arg-type]
    dial = Dial(model, text, COSTS, **READ)
    with pytest.raises(BudgetUnreachable):
        dial.solve(0.5)
    assert len(dial.readings) <= 4
    assert dial.solve(0.5, jump=0.4).cost == pytest.approx(0.15)
