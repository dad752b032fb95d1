"""Details of a patch that change no shape and no usual number, each held by itself."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention import cost
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.shapes import ExpertShape
from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.data.stream import stream_of
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.memory import LayerMemory, Running
from bayes_router.integrations.calls.softmax import LocalExpert
from bayes_router.integrations.huggingface.interface import keep_hidden
from bayes_router.integrations.huggingface.pressure import BudgetRange, OneBudget
from bayes_router.integrations.patch.cost import layer_costs
from bayes_router.integrations.patching import patch
from tests.integrations.test_torch_attention import draw, encoder
from tests.integrations.tiny_models import VOCAB, patched, tiny, tokens


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


REAL = torch.tensor([[False, True, True, True, True]])
LONGER = torch.cat([REAL, torch.ones(1, 1, dtype=torch.bool)], 1)


@pytest.mark.parametrize(
    ("before", "now", "keys", "kept"),
    [
        (None, None, 6, True),
        (None, None, 7, False),  # not grown by the new token alone
        (REAL, LONGER, 6, True),
        (REAL, ~LONGER, 6, False),  # other keys are hidden now
        (REAL, None, 6, False),
        (None, LONGER, 6, False),
        (REAL, LONGER.expand(2, -1), 6, False),  # another batch
    ],
)
def test_a_state_is_reused_only_for_the_keys_that_it_is_of(
    before: Tensor | None, now: Tensor | None, keys: int, kept: bool
) -> None:
    memory, first, new = LayerMemory(), torch.randn(1, 1, 5, 2), torch.randn(1, 1, keys, 2)
    memory.follow(None, first, 5, True, before)
    memory.running[Tensor] = Running(torch.zeros(1), 5)
    memory.follow(first, new, 1, True, now)
    assert bool(memory.running) == kept


@pytest.mark.parametrize("scale", [0.1, 50.0])
@torch.no_grad()
def test_a_controller_reads_hidden_states_on_one_scale(scale: float) -> None:
    _, router = patched("llama")
    read: list[Tensor] = []
    posterior = router.controller.posterior
    router.controller.posterior = lambda layer, hidden: (
        read.append(hidden),
        posterior(layer, hidden),
    )[1]
    hidden = torch.randn(2, 9, 32) * torch.logspace(-1, 1, 9)[:, None]
    assert torch.equal(router.route(0, hidden), router.route(0, scale * hidden))
    torch.testing.assert_close(read[0].square().mean(-1), torch.ones(2, 9), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read[1], read[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("way", ["whole", "narrowed"])
@pytest.mark.parametrize("hidden", range(9))
def test_first_keys_inside_the_window_count_once(hidden: int, way: str) -> None:
    """A text behind `hidden` padded slots.

    Its first keys wander into the window of the newest token.
    """
    torch.manual_seed(0)
    q, k, v, slots = (
        torch.randn(1, 2, 1, 8),
        torch.randn(1, 2, 12, 8),
        torch.randn(1, 2, 12, 8),
        torch.arange(12),
    )
    mask = (slots >= hidden)[None, None, None]
    call = AttentionCall(q, k, v, mask, True, attention, 8**-0.5, plain=True)
    expert = LocalExpert(ExpertShape(2, 8, 5), 2, sinks=3)
    found = (
        expert(call) if way == "whole" else expert.read(expert.narrowed(replace(call, plain=False)))
    )
    seen = mask & ((slots > 11 - 5) | (slots < hidden + 3))
    torch.testing.assert_close(found, attention(q, k, v, seen), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "key_value_states"])
def test_cross_attention_is_given_no_hidden_state(name: str) -> None:
    model, router = patched("llama")
    module = model.model.layers[0].self_attn
    for crossed in (False, True, False):
        keep_hidden(
            module._bayes_router,
            module,
            (torch.zeros(1, 3, 32),),
            {name: torch.zeros(1, 2, 32)} if crossed else {},
        )
        assert module._bayes_router.awaits != crossed


def test_no_layer_costs_more_than_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock a window may be slower than all keys.

    `local` is no dearer than the layer's own shorter window.
    """
    slow = {LocalAttention: 3.0}
    monkeypatch.setattr(
        cost, "measured_latencies", lambda experts, *_: [slow.get(type(e), 1.0) for e in experts]
    )
    config = ModelConfig(
        8, d_model=16, num_layers=2, num_heads=2, experts=("full", "local"), window=6
    )
    _, costs = layer_costs(PriorConfig(cost="latency"), config, 64, [4, None])
    assert costs.tolist() == [[1.0, 1.0], [1.0, 3.0]]
    _, counted = layer_costs(PriorConfig(cost="flops"), config, 64, [4, None])
    assert counted[0, 0] == counted[0, 1] < counted[1, 1] < counted[1, 0] == 1


@pytest.mark.parametrize("kind", ["one", "range"])
def test_a_cost_above_the_budget_raises_the_price_and_one_below_lowers_it(kind: str) -> None:
    prices: dict[str, list[float]] = {}
    for name, spent in (("above", 0.25), ("met", 0.0), ("below", -0.25)):
        pressure: Any = (
            OneBudget(0.5, 2.0) if kind == "one" else BudgetRange(0.5, 0.5, 0.1, 1.0, 2.0)
        )
        random = np.random.default_rng(0)
        prices[name] = []
        for _ in range(3):
            prices[name].append(pressure.ask(1.0, random).price)
            pressure.see(0.5 + spent)
    assert prices["above"][0] == prices["met"][0] == prices["below"][0]
    assert prices["above"][0] < prices["above"][1] < prices["above"][2]
    assert prices["below"][0] > prices["below"][1] > prices["below"][2]
    assert prices["met"][2] == pytest.approx(prices["met"][0], rel=1e-6)


def test_the_price_of_a_fit_moves_against_the_budget() -> None:
    """It starts at 1, and executed costs move it.

    They lie above the one budget at first, and soon below the other.
    """
    text = torch.randint(3, VOCAB, (800,), generator=torch.Generator().manual_seed(0))
    settings = {"steps": 24, "context": 32, "batch_size": 4, "controller_lr": 0.03, "warmup": 2}
    ends = {}
    for budget in (0.31, 0.9):
        router = patch(
            tiny("llama"), window=4, experts=("full", "local"), prior=PriorConfig(price=1.0)
        )
        frame = router.fit(text, budget=budget, **settings)
        ends[budget] = float(frame["price"].iloc[-1])
    assert ends[0.9] < 0.8 < 1.0 < ends[0.31]


@pytest.mark.parametrize("kind", ["language", "torch"])
def test_feature_maps_are_taught_full_attention_wherever_it_stands(kind: str) -> None:
    """One step's error, by hand.

    Of `mapped` from `full`, which is neither the first expert nor the last.
    """
    names = ("local", "full", "mapped")
    model = encoder().eval() if kind == "torch" else tiny("llama")
    router, errors = patch(model, window=2, experts=names), []

    def compare(index: int, call: AttentionCall, hidden: Tensor) -> None:
        full, mapped = (
            router.layers[index].expert(names.index(name))(call) for name in ("full", "mapped")
        )
        errors.append(float((mapped - full).square().mean() / full.square().mean()))

    text = tokens(1, 400)[0]
    source, _ = stream_of(text, None, VOCAB, True).split(0.1)
    with torch.no_grad(), router.observed_by(compare):
        model(draw() if kind == "torch" else source.batch(0, 2, 20, 7).tokens)
    if kind == "torch":
        first = router.distil([draw()])[0]
    else:
        first = router.fit(text, steps=1, distil_steps=1, context=20, batch_size=2).attrs[
            "distillation"
        ][0]
    assert first == pytest.approx(sum(errors) / len(errors), rel=1e-4)
