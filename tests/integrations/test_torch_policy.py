"""Budgets and static units of patched PyTorch modules, by inputs that one gives."""

from typing import Any

import pytest
import torch
from torch import nn

from bayes_router.integrations.patching import load_patch, patch
from bayes_router.routing.policy import Argmax, Budget
from tests.integrations.test_torch_attention import PADDING, D, H, draw, encoder, scatter

INPUTS: list[Any] = [draw(), (draw(seed=7), None, PADDING), draw(seed=8)[:, :9]]


def routed(model: nn.Module | None = None, **settings: Any) -> Any:
    router = patch(model or encoder().eval(), window=5, experts=("full", "local"), **settings)
    scatter(router)
    return router


@torch.no_grad()
def executed(router: Any, inputs: list[Any]) -> float:
    """Cost of the routes by hand: of each layer the mean over real tokens and units."""
    taken: list[list[torch.Tensor]] = [[] for _ in router.layers]
    for x in inputs:
        router.model(*(x if isinstance(x, tuple) else (x,)))
        for layer, routes in enumerate(taken):
            route, real = router.last.executed[layer], router.last.real[layer]
            routes.append((route if real is None else route[real]).flatten())
    costs = [router.layer_cost[i][torch.cat(routes)].mean() for i, routes in enumerate(taken)]
    return float(torch.stack(costs).mean())


@pytest.mark.parametrize("route_by", ["layer", "head"])
def test_a_budget_is_what_the_executed_routes_of_the_inputs_cost(route_by: str) -> None:
    router = routed(route_by=route_by)
    router.force("local")
    for budget in (0.45, 0.6):
        cost = router.set_budget(budget, INPUTS)
        assert abs(cost - budget) <= 0.005 and isinstance(router.policy, Budget)
        assert router.forced
        router.force(None)
        assert executed(router, INPUTS) == pytest.approx(cost, abs=1e-6)
        router.force("local")


def test_layers_that_read_other_lengths_count_alike() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(D, H, 1, 1, 48, dropout=0.0, batch_first=True).eval()
    router = routed(model)
    inputs = [(draw(), draw(seed=5)[:, :7])]
    cost = router.set_budget(0.5, inputs, tolerance=0.02)
    assert abs(cost - 0.5) <= 0.02 and executed(router, inputs) == pytest.approx(cost, abs=1e-6)


def certain(router: Any) -> None:
    """Unit 1 of each layer on `local` whatever the token, and its controller's other rows too."""
    for controller in router.controller.layers:
        weight = controller.out.weight.view(H, 2, -1)
        weight.data[1] = 0
        controller.out.bias.data.view(H, 2)[1] = torch.tensor([-20.0, 20.0])


def test_units_that_nobody_moves_are_static_and_their_controllers_not_run(tmp_path: Any) -> None:
    router = routed(route_by="head")
    certain(router)
    with torch.no_grad():
        before = router.model(INPUTS[0])
    found = router.freeze(INPUTS)
    assert router.frozen.experts == ((-1, 1, -1, -1),) * 2 and not router.training
    assert (found.frozen, found.units, found.inputs) == (2, 8, 2)
    assert found.loss == found.loss_before > 0 and found.cost == found.cost_before
    assert found.cost == pytest.approx(executed(router, INPUTS[1:]), abs=1e-6)
    assert str(found).startswith("2 of 8 units frozen: loss ")
    for controller in router.controller.layers:
        controller.out.weight.data.view(H, 2, -1)[1] = torch.nan
    with torch.no_grad():
        assert torch.equal(router.model(INPUTS[0]), before)
    with pytest.raises(ValueError, match="fit: expected units that all choose"):
        router.fit(INPUTS)
    router.save(tmp_path)
    model = router.unpatch()
    again = load_patch(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(INPUTS[0]), before)
    again.thaw()
    assert again.frozen is None


def test_freezing_tells_what_it_costs_in_a_loss_of_ones_own() -> None:
    router = routed(route_by="head").train()
    seen: list[Any] = []

    def loss(out: torch.Tensor) -> torch.Tensor:
        seen.append(router.last.executed[0])
        return out.pow(4).mean()

    found = router.freeze(INPUTS, share=0.4, loss=loss)
    assert router.training and 0 < found.frozen < 8 and found.loss != found.loss_before
    assert len(seen) == 4 and seen[0].dtype == torch.int64  # as executed, both inputs, twice


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.set_budget(0.5, []), "inputs: expected one or more; got 'none'"),
        (lambda r: r.set_budget(0.5, draw()), "inputs: expected a list of what the module"),
        (lambda r: r.set_budget(2.0, INPUTS), "budget: expected a cost from 0.300 .* to 1.000"),
        (lambda r: r.set_budget(float("nan"), INPUTS), "budget: expected"),
        (lambda r: r.set_budget("half", INPUTS), "budget: expected a number; got 'half'"),
        (lambda r: r.freeze(INPUTS[:1]), "inputs: expected two or more; got 1"),
        (lambda r: r.freeze(INPUTS, share=0.5), "share: expected 0 or more"),
        (lambda r: r.freeze(INPUTS, share=float("nan")), "share: expected 0 or more"),
        (lambda r: (r.unpatch(), r.freeze(INPUTS)), "router: expected a patched model"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Any, message: str) -> None:
    router = routed()
    with pytest.raises(ValueError, match=message):
        call(router)
    assert isinstance(router.policy, Argmax) and router.frozen is None


def test_freezing_that_fails_leaves_units_as_they_were() -> None:
    router = routed(route_by="head")
    certain(router)
    router.freeze(INPUTS)
    kept = router.frozen

    def broken(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        router.freeze(INPUTS, loss=broken)
    assert router.frozen is kept and not router.forced and router.mode is None
