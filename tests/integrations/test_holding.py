"""A budget held from pass to pass, on text of another kind than it was set on."""

import pytest
import torch

from bayes_router.routing.policy import Conservative
from tests.integrations.tiny_models import VOCAB, patched, tokens

BUDGET, T = 0.6, 96


def router_of():
    model, router = patched(
        "llama", window=8, sinks=4, experts=("full", "local"), route_by="head", context=T
    )
    router.full_up_to = 0
    return model, router


def kinds():
    """Passes of a few ids, then as many of all."""
    every = [tokens(1, T, seed=i) for i in range(60)]
    return [3 + ids % 6 for ids in every] + every


def spent(router, passes, model):
    with torch.no_grad():
        costs = []
        for ids in passes:
            model(ids, use_cache=False)
            routes = torch.stack([router.last.executed[i] for i in range(len(router.layers))])
            costs.append(float((routes == 0).double().mean()))
    local = float(router.layer_cost[..., 1].mean())
    return local + (1 - local) * torch.tensor(costs).mean().item()


def test_other_text_costs_the_budget_too():
    model, router = router_of()
    first, second = kinds()[:60], kinds()[60:]
    with torch.no_grad(), router.holding(BUDGET) as held:
        for ids in first:
            model(ids, use_cache=False)
    assert held.cost == pytest.approx(BUDGET, abs=0.01) and held.tokens == 60 * T
    unheld = spent(router, second, model)
    with router.holding(BUDGET) as held:
        found = spent(router, second, model)
    assert held.cost == pytest.approx(found, abs=1e-5)
    assert abs(found - BUDGET) < 0.02 < abs(unheld - BUDGET)
    before = router.policy
    model(first[0], use_cache=False)
    assert router.policy == before  # after the block nothing moves


def test_steps_of_decoding_are_gathered_and_no_route_sees_what_follows():
    model, router = router_of()
    with torch.no_grad(), router.holding(BUDGET) as held:
        policies = []
        for ids in kinds()[:3]:
            out = model(ids, use_cache=True)
            policies.append(router.policy)
        assert policies[0] == policies[1] != policies[2]  # 256 tokens and more
        for _ in range(4):
            out = model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        assert held.tokens == 3 * T + 4 and router.policy == policies[2]
        router.force("full")
        model(ids, use_cache=False)
        assert held.tokens == 3 * T + 4
        router.force(None)


def test_draws_and_mixtures_move_no_price():
    model, router = router_of()
    before = router.policy
    with router.holding(BUDGET) as held:
        for ids in kinds()[:3]:
            router(ids, "mean")
        model.train()
        model(ids, use_cache=False).logits.sum().backward()
        model.eval()
    assert held.tokens == 0 and router.policy == before
    assert str(held) == f"Holding(budget {BUDGET:g}, cost 0.0000, 0 tokens)"


def test_what_cannot_be_held_is_refused():
    model, router = router_of()
    usual, router.policy = router.policy, Conservative(tuple(router.cost_ratio.tolist()))
    with pytest.raises(ValueError, match="^policy: expected Argmax or Budget; got 'Conservative'"):
        router.holding(BUDGET).__enter__()
    router.policy = usual
    with pytest.raises(ValueError, match="budget: expected a cost above"), router.holding("half"):
        pass
    with pytest.raises(ValueError, match="budget: expected a cost above"), router.holding(0.01):
        pass
    with pytest.raises(ValueError, match="budget: expected"), router.holding(1.5):
        pass
    router.freeze(torch.randint(3, VOCAB, (400,)), share=0.4, context=T)
    assert router.frozen is not None
    with pytest.raises(ValueError, match="thaw"):
        router.holding(BUDGET)
