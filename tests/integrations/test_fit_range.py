"""A fit that serves a range of budgets.

A budget and a length drawn each step, held by prices of their own.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Dirichlet

from bayes_router.config import PriorConfig, ScheduleConfig
from bayes_router.integrations.huggingface.fit_settings import FitSettings, final_state
from bayes_router.integrations.huggingface.pressure import BudgetRange, Dialled
from bayes_router.integrations.huggingface.svi_step import Counting, SviStep
from bayes_router.integrations.patching import load_patch
from bayes_router.routing.cost import counted
from bayes_router.routing.policy import Budget
from tests.integrations.tiny_models import VOCAB, patched, tiny

TEXT = torch.randint(3, VOCAB, (4000,), generator=torch.Generator().manual_seed(0))
PRIOR = PriorConfig(cost="flops", price=30.0, total_concentration=2.0, map="uniform")
RANGE = {
    "budget": (0.5, 0.9),
    "context": (40, 20),
    "batch_size": 2,
    "controller_lr": 0.02,
    "distil_steps": 0,
}


def ranged(**settings: object) -> tuple[object, object]:
    return patched(
        "llama", window=8, experts=("full", "local"), prior=PRIOR, context=40, **settings
    )


def test_prices_bring_what_is_spent_to_what_is_asked() -> None:
    """A plant whose log odds fall with the log price, and that answers the dial by too much."""
    pressure, random, errors = BudgetRange(0.2, 0.8, 0.1, 1.0, 30.0), np.random.default_rng(0), []
    for step in range(800):
        asked = pressure.ask(step / 800, random)
        odds = 3.0 - 0.5 * math.log(asked.price) - asked.dial
        pressure.see(0.1 + 0.9 / (1 + math.exp(-odds)))
        errors.append(abs(1 / (1 + math.exp(-odds)) - pressure.share))
    assert np.mean(errors[-100:]) < 0.02 and np.mean(errors[:20]) > 0.1


def test_the_range_opens_from_the_top_and_the_dial_says_the_share() -> None:
    pressure, random = BudgetRange(0.28, 0.82, 0.1, 1.0, 30.0), np.random.default_rng(0)

    def shares(progress: float) -> list[float]:
        drawn = []
        for _ in range(300):
            asked = pressure.ask(progress, random)
            assert asked.dial == pytest.approx(2.6 * math.log(0.15 / pressure.share) / 0.9)
            drawn.append(pressure.share)
        return drawn

    assert shares(0.0) == pytest.approx([0.8] * 300)
    late = shares(1.0)
    assert min(late) == pytest.approx(0.2, rel=0.05) and max(late) == pytest.approx(0.8, rel=0.05)
    assert np.median(late) == pytest.approx(math.sqrt(0.2 * 0.8), rel=0.15)  # log-uniform


def test_a_dialled_posterior_decides_as_a_budget_of_that_price() -> None:
    _, router = ranged()
    torch.manual_seed(1)
    for controller in router.controller.layers:
        torch.nn.init.normal_(controller.out.weight)
    dialled, hidden = Dialled(router.controller, router.layer_cost), torch.randn(2, 9, 32)
    plain = router.controller.posterior(1, hidden).concentration
    for dialled.dial in (-2.0, 0.0, 3.0):
        q = dialled.posterior(1, hidden)
        assert isinstance(q, Dirichlet)
        floor = 0.02 if dialled.dial else 0.0  # of two experts
        torch.testing.assert_close(q.concentration.sum(-1), plain.sum(-1) + floor)
        assert float(q.concentration.detach().min()) > 0.0099
        same = Budget(tuple(router.layer_cost[1].tolist()), dialled.dial)(plain)
        assert torch.equal(q.concentration.argmax(-1), same)


def test_one_fit_serves_a_range(tmp_path: Path) -> None:
    model, router = ranged()
    frame = router.fit({"one": TEXT, "other": TEXT.flip(0)}, steps=30, **RANGE)
    assert set(frame["context"]) == {20, 40} and frame["dial"].nunique() == 30
    late = frame[frame["step"] > 12]
    lavish, thrifty = (late.nsmallest(6, "dial"), late.nlargest(6, "dial"))
    assert lavish["cost"].mean() > thrifty["cost"].mean() + 0.05
    spent = [router.set_budget(b, context=40, limit=400) for b in (0.55, 0.85)]
    assert spent == pytest.approx([0.55, 0.85], abs=0.006)
    router.save(tmp_path)
    again = load_patch(tiny("llama"), tmp_path)
    assert (
        again.fitted == router.fitted
        and again.fitted.budget == (0.5, 0.9)
        and again.fitted.context == 40
    )


def test_a_step_has_as_many_tokens_at_every_length() -> None:
    settings, random = FitSettings(context=(40, 20, 10), batch_size=2), np.random.default_rng(0)
    assert {settings.shape(random) for _ in range(50)} == {(2, 40), (4, 20), (8, 10)}
    assert FitSettings(context=30, batch_size=3).shape(random) == (3, 30)


@pytest.mark.parametrize("budget", [(0.9, 0.5), (0.0, 0.5), (0.2, 0.5, 0.7)])
def test_ranges_that_are_none_are_refused(budget: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError,
        match=r"budget: expected a cost in \(0, 1\], full = 1, or \(low, high\), or None",
    ):
        FitSettings(budget=budget)  # type: ignore[arg-type]


def test_a_range_below_the_cheapest_expert_is_refused() -> None:
    _, router = ranged()
    with pytest.raises(ValueError, match="budget: expected a range above"):
        router.fit(TEXT, steps=1, **{**RANGE, "budget": (0.01, 0.9)})


def test_rates_stay_at_their_peak_until_the_last_part_of_the_fit() -> None:
    settings = FitSettings(steps=100, warmup=4, decay=0.25)
    found = [settings.rate(step, step / 100) for step in range(100)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0] and set(found[4:75]) == {1.0}
    assert found[75:] == pytest.approx([(100 - step) / 25 for step in range(75, 100)])
    assert FitSettings(steps=100, warmup=0).rate(0, 0.95) == pytest.approx(0.2)  # time is short


def test_a_fit_follows_its_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    step = torch.optim.AdamW.step

    def seen(optimiser: torch.optim.AdamW) -> None:
        found.append(optimiser.param_groups[0]["lr"])
        step(optimiser)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    _, router = ranged()
    router.fit(TEXT, steps=4, warmup=2, decay=0.5, progress=False, **RANGE)
    router.unpatch()
    assert found == pytest.approx([0.01, 0.02, 0.02, 0.01])


def test_biases_have_a_rate_of_their_own() -> None:
    """Adam's first step moves every number by its rate."""
    moved = []
    for rate in (None, 0.2):
        _, router = ranged()
        before = router.controller.layers[0].out.bias.detach().clone()
        router.fit(
            TEXT, steps=1, warmup=0, bias_lr=rate, progress=False, **RANGE | {"budget": None}
        )
        moved.append(float((router.controller.layers[0].out.bias.detach() - before).abs().max()))
        router.unpatch()
    assert moved == pytest.approx([0.02, 0.2], rel=0.05)
    with pytest.raises(ValueError, match="bias_lr: expected a positive number; got 0"):
        FitSettings(bias_lr=0)


def test_a_range_is_fitted_by_the_gradient_of_means_and_one_budget_by_that_of_draws() -> None:
    assert FitSettings(budget=(0.3, 0.9)).gradient_of == "mean"
    observed = {"range": FitSettings(budget=(0.3, 0.9)).text, "one": FitSettings(budget=0.3).text}
    assert observed == {"range": 0.1, "one": 0.0}
    assert FitSettings(budget=(0.3, 0.9), weights_lr=1e-4).text == 1
    assert FitSettings(budget=0.3).gradient_of == FitSettings().gradient_of == "draw"
    assert FitSettings(budget=(0.3, 0.9), through="draw").gradient_of == "draw"
    with pytest.raises(ValueError, match="through.*draw, mean.*median"):
        FitSettings(through="median")


@pytest.mark.parametrize("through", ["draw", "mean"])
def test_an_executed_choice_has_the_gradient_of_what_stands_for_it(through: str) -> None:
    """Under a loss that is linear in the weights, that of the mean is the same for every draw."""
    _, router = ranged()
    start = final_state(router, ScheduleConfig(straight_through_from=0.0))
    step = SviStep(router, FitSettings(through=through, likelihood="text"), start)
    network = Linear(router, len(router.layers))
    step.objective.model.network = network
    bias = router.controller.layers[0].out.bias
    gradients = []
    for seed in range(6):
        torch.manual_seed(seed)
        network.executed.clear()
        guide = step.objective.guide(TEXT[None, :40])
        loss = sum((w * torch.tensor([1.0, 0.0])).sum() for w in network.executed)
        (gradient,) = torch.autograd.grad(loss, bias)
        gradients.append(gradient)
        for weights, drawn in zip(network.executed, guide.values(), strict=True):
            assert torch.equal(weights.detach().argmax(-1).flatten(), drawn.argmax(-1).flatten())
            assert set(weights.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
    same = all(torch.allclose(g, gradients[0], rtol=1e-4) for g in gradients)
    assert same == (through == "mean") and gradients[0].abs().min() > 0


class Linear:
    """A network that keeps the weights that it is asked to execute."""

    def __init__(self, router: object, layers: int):
        self.num_units, self.layers, self.executed = router.config.num_units, layers, []

    def __call__(self, tokens: torch.Tensor, route: object) -> torch.Tensor:
        hidden = torch.ones(*tokens.shape, 32)
        self.executed += [route(layer, hidden) for layer in range(self.layers)]
        return torch.zeros(*tokens.shape, VOCAB)


def test_a_graph_is_for_cuda() -> None:
    _, router = ranged()
    with pytest.raises(ValueError, match="graph.*CUDA device.*cpu"):
        router.fit(TEXT, steps=1, **RANGE, graph=True, progress=False)


def test_a_fit_holds_a_budget_in_bytes_and_says_so(tmp_path: Path) -> None:
    """A key head reads the most that one of its query heads does: dearer than in FLOPs."""
    _, router = ranged(route_by="head")
    first = {}
    for by in ("flops", "bytes"):
        _, router = ranged(route_by="head")
        first[by] = router.fit(TEXT, steps=2, **RANGE, by=by, progress=False).iloc[0]
    assert first["bytes"]["cost"] > first["flops"]["cost"]
    below = RANGE | {"budget": (0.25, 0.9)}  # between a local token's bytes and its FLOPs
    router.fit(TEXT, steps=1, **below, by="bytes", progress=False)
    router.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| budget (executed cost in bytes of the cache that a decoding step reads, full" in card
    assert "FLOPs" not in card
    again = tiny("llama")
    assert load_patch(again, tmp_path).fitted.by == "bytes"
    _, router = ranged(route_by="head")
    with pytest.raises(ValueError, match="budget: expected a range above 0.356"):
        router.fit(TEXT, steps=1, **below, progress=False)
    units = router.config.num_units
    routes = torch.randint(2, (len(router.layers), 1, 40, units))
    sharing = router.config.num_units // router.config.kv_heads
    weights = torch.nn.functional.one_hot(routes, 2).float()
    spent: list[torch.Tensor] = []
    reads = router.layer_reads
    Counting(router, reads, spent, sharing)(TEXT[None, :40], lambda layer, hidden: weights[layer])
    in_bytes = counted(reads, sharing)(routes)
    assert float(torch.stack(spent).mean()) == pytest.approx(in_bytes, rel=1e-6)
    assert sharing > 1 and in_bytes > counted(reads)(routes)
    with pytest.raises(ValueError, match="by.*bytes, flops.*watts"):
        router.fit(TEXT, steps=1, **RANGE, by="watts")


def test_a_share_of_what_a_fit_observes_may_be_the_text(tmp_path: Path) -> None:
    losses, apart = {}, {}
    for likelihood in ("model", "text", "both", 0.2, 0, 1.0):
        model, router = ranged()
        model.lm_head.weight.data.mul_(30)  # predictions that routes can move
        frame = router.fit(
            TEXT, **RANGE | {"steps": 1, "likelihood": likelihood, "progress": False}
        )
        losses[likelihood] = float(frame["nll"].iloc[0])
        assert router.fitted.likelihood == likelihood
        assert ("divergence" in frame) == (likelihood not in ("text", 1.0))
        apart[likelihood] = float(frame.get("divergence", [math.nan])[0])
    assert losses["both"] == pytest.approx((losses["model"] + losses["text"]) / 2, rel=1e-5)
    fifth = 0.8 * losses["model"] + 0.2 * losses["text"]
    assert losses[0.2] == pytest.approx(fifth, rel=1e-5)
    assert (losses[0], losses[1.0]) == (losses["model"], losses["text"])
    # the first step's routes are those of all: so is what they lose against the unpatched model
    assert apart["both"] == apart[0.2] == apart[0] == apart["model"] > 1e-4
    _, router = ranged()
    router.fit(TEXT, **RANGE | {"steps": 1, "progress": False})  # a range takes a tenth
    router.save(tmp_path)
    assert "| likelihood | 0.1 text, the rest model |" in (tmp_path / "README.md").read_text()
    assert load_patch(tiny("llama"), tmp_path).fitted.likelihood == 0.1
    for wrong in (1.2, -0.1, "half"):
        with pytest.raises(ValueError, match="likelihood"):
            router.fit(TEXT, steps=1, likelihood=wrong)
    assert abs(losses["model"] - losses["text"]) > 1e-3
