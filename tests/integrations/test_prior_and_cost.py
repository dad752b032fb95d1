"""What a patch pays: the KL carries the price, a budget is met or refused.

A layer that slides already costs less.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayes_router.attention.experts.full import FullAttention
from bayes_router.attention.kernels.eager.fused import fused_attention
from bayes_router.attention.shapes import ExpertShape
from bayes_router.config import PriorConfig
from bayes_router.diagnostics.measures.collapse import kl_to_prior
from bayes_router.inference.elbo import NegativeELBO
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.layer import EXPERTS
from bayes_router.integrations.patch.cost import layer_costs
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.routing.policy import Budget
from bayes_router.training.evaluate import _Prior
from tests.integrations.test_torch_attention import draw, encoder
from tests.integrations.tiny_models import VOCAB, patched, scatter_routes, tiny, tokens

TEXT = torch.randint(3, VOCAB, (600,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("price", [0.0, 50.0])
def test_kl_is_that_of_the_evaluation_price_included(price: float) -> None:
    _, router = patched("llama", prior=PriorConfig(price=price))
    concentration = router(tokens()).concentration
    expected = _Prior(router.prior.concentration, price * router.cost_ratio).kl(
        concentration.flatten(1, 2).double()
    )
    torch.testing.assert_close(router.kl().double(), expected.mean(1).sum(), rtol=1e-4, atol=1e-4)


def test_a_higher_price_is_a_higher_kl_of_the_same_routes() -> None:
    kl = []
    for price in (0.0, 50.0):
        model = encoder().eval()
        router = patch(model, window=5, prior=PriorConfig(price=price))
        model(draw())
        kl.append(float(router.kl().detach()))
    assert kl[1] > kl[0] + 20  # unfitted posteriors put 0.9 on full attention, in two layers


def test_after_a_fit_the_kl_has_the_price_of_that_fit() -> None:
    _, router = patched("llama", experts=("full", "local"))
    router.fit(TEXT, steps=3, distil_steps=0, context=20, batch_size=2, budget=0.4)
    program = router.program()[0]
    assert router.price == program.price != router.settings.prior.price
    out = router(tokens())
    expected = [program.token_prior(i) for i in range(2)]
    terms = [
        torch.distributions.kl_divergence(torch.distributions.Dirichlet(q), p).mean()
        for q, p in zip(out.concentration, expected, strict=True)
    ]
    torch.testing.assert_close(router.kl(), torch.stack(terms).sum(), rtol=1e-4, atol=1e-4)


def test_the_price_presses_on_a_torch_module() -> None:
    costs = []
    for price in (0.0, 50.0):
        model = encoder().eval()
        router = patch(model, window=5, prior=PriorConfig(price=price, map="uniform"))
        router.fit([draw(seed=s % 3) for s in range(30)], kl_weight=0.1, lr=0.03)
        model(draw())
        costs.append(sum(layer.cost for layer in router.statistics()) / 2)
    assert costs[1] < 0.5 * costs[0]


def _cost(router: Any, ids: Tensor) -> float:
    routes = router(ids).route.flatten(1)
    return float(router.layer_cost.gather(1, routes).mean())


@pytest.mark.parametrize(
    ("name", "budget"), [("gpt2", 0.5), *(("llama", b) for b in (1.0, 0.6, 0.35, 0.2, 0.15))]
)
def test_a_budget_is_met_within_half_a_percent(name: str, budget: float) -> None:
    _, router = patched(name, experts=("full", "mapped", "local"))
    realised = router.set_budget(budget, TEXT, context=60)
    assert abs(realised - budget) <= 0.005
    # a token or two at the very price
    assert realised == pytest.approx(_cost(router, TEXT[:540].view(9, 60)), abs=2e-3)
    assert isinstance(router.policy, Budget)


def test_budgets_out_of_reach_name_the_range() -> None:
    _, router = patched("llama")
    usual = router.policy
    with pytest.raises(ValueError, match="held-out"):
        router.set_budget(0.5)
    with pytest.raises(
        ValueError, match=r"budget: expected a cost from 0.150 \(.*\) to 1.000 .*; got 0.1"
    ):
        router.set_budget(0.1, TEXT, context=32)
    with pytest.raises(ValueError, match="budget: expected a cost from 0.150"):
        router.set_budget(1.2, TEXT, context=32)
    alike = patch(tiny("gpt2"), window=6)  # unfitted: one posterior for all tokens
    with pytest.raises(
        ValueError,
        match=r"budget: expected .* within 0.005; got 0.5, in a jump.*from 1.000 to 0.150",
    ):
        alike.set_budget(0.5, TEXT, context=32)
    assert router.policy is usual and alike.set_budget(1.0, TEXT, context=32) == 1.0
    # the nearer end of the jump
    assert alike.set_budget(0.9, TEXT, context=32, tolerance=0.2) == 1.0
    with pytest.raises(ValueError, match="within 0.05;.*or a larger tolerance"):
        alike.set_budget(0.9, TEXT, context=32, tolerance=0.05)


def test_a_budget_is_solved_under_evaluation_and_unforced() -> None:
    model, router = patched("llama", experts=("full", "local"))
    model.train()
    router.force("full")
    assert abs(router.set_budget(0.5, TEXT, context=60) - 0.5) <= 0.005
    assert model.training and router._force == "full"


def test_a_layer_that_slides_already_costs_its_own_window() -> None:
    router = patch(tiny("gemma3"), window=6, context=120, prior=PriorConfig(cost="flops"))
    sliding, whole = router.layer_cost  # windows of 12 and none; full, linear, local
    T = 120
    share = sum(min(t + 1, 12) for t in range(T)) / (T * (T + 1) / 2)
    assert float(sliding[0]) == pytest.approx(share, rel=1e-5) and float(whole[0]) == 1.0
    assert sliding[2] == whole[2] < sliding[0]
    assert router.prior.mean[0, 0] > router.prior.mean[1, 0]  # cheaper, hence likelier
    router(tokens(1, 40))
    assert [layer.cost for layer in router.statistics()] == pytest.approx([share, 1.0])


def test_windows_of_the_layers_own_in_the_units_of_the_paper() -> None:
    mistral = patch(tiny("mistral"), window=20)
    # local attention, that is what it is
    assert mistral.layer_cost.tolist() == [pytest.approx([0.3, 0.15, 0.3])] * 2
    short = patch(tiny("mistral"), window=20, context=12)
    # a window as long as the text hides nothing
    assert short.layer_cost.tolist() == [pytest.approx([1.0, 0.15, 0.3])] * 2
    by_hand = patch(tiny("mistral"), window=20, prior=PriorConfig(cost_ratio=(1.0, 0.2, 0.4)))
    assert by_hand.layer_cost.tolist() == [pytest.approx([1.0, 0.2, 0.4])] * 2


def test_policies_and_budgets_know_what_a_sliding_layer_costs() -> None:
    _, router = patched("gemma3", experts=("full", "local"))
    # of at most 0.65: one layer costs 0.3 at most
    assert abs(router.set_budget(0.5, TEXT, context=60) - 0.5) <= 0.005
    with pytest.raises(ValueError, match="to 0.650"):
        router.set_budget(0.9, TEXT, context=60)
    router.policy = Budget(tuple(router.cost_ratio.tolist()), 1e4)
    route = router(tokens()).route
    # local saves nothing in the sliding layer
    assert (route[1] == 1).all() and not (route[0] == 1).all()


def test_fit_counts_the_cost_of_sliding_layers() -> None:
    router = patch(tiny("mistral"), window=6, experts=("full", "local"))
    scatter_routes(router)
    frame = router.fit(TEXT, steps=2, distil_steps=0, context=30, batch_size=2)
    assert frame["cost"].tolist() == pytest.approx([0.3, 0.3])


def test_kl_of_sliding_layers_is_tilted_by_their_own_costs() -> None:
    _, router = patched("gemma3", prior=PriorConfig(price=7.0))
    concentration = router(tokens()).concentration.flatten(1, 2).double()
    expected = sum(
        _Prior(router.prior.concentration[i : i + 1], 7.0 * router.layer_cost[i])
        .kl(concentration[i : i + 1])
        .mean()
        for i in range(2)
    )
    torch.testing.assert_close(router.kl().double(), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_never_routed_are_named() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.crossing = (
                nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2)
            )

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            x = self.own(x, x, x, need_weights=False)[0]
            out: Tensor = self.crossing(x, memory, memory, need_weights=False)[0]
            return out

    model = Crossed().eval()
    router = patch(model, window=5)
    with pytest.warns(UserWarning, match="crossing: .*cross-attention"):
        model(draw(), draw(seed=2))
    with pytest.raises(ValueError, match="crossing"):
        router.kl()
    router.unpatch()
    router = patch(model, window=5, layers=(0,))
    model(draw(), draw(seed=2))
    assert router.kl().isfinite()


@pytest.mark.parametrize("likelihood", ["model", "text"])
def test_the_program_tilts_each_layer_by_its_own_costs(likelihood: str) -> None:
    _, router = patched("gemma3", prior=PriorConfig(price=7.0))
    program, guide = router.program()
    program.straight_through = False  # as SAMPLE executes draws
    torch.manual_seed(0)
    objective = NegativeELBO(program, guide)
    _, terms = objective(tokens(), tokens())
    torch.manual_seed(0)
    with torch.no_grad():
        router(tokens(), "sample")
    torch.testing.assert_close(router.kl(), terms.kl, rtol=1e-4, atol=1e-4)
    assert (
        router.fit(TEXT, steps=1, distil_steps=0, context=20, batch_size=2, likelihood=likelihood)[
            "kl"
        ]
        .notna()
        .all()
    )


def test_a_learned_map_has_one_name_and_its_own_cost(tmp_path: Path) -> None:
    """`linear` was its name in patches once.

    Those that were saved then are read, new ones are told the name of today.
    """
    names = ("full", "mapped", "gated", "local")
    model, router = patched("llama", experts=names, prior=PriorConfig(cost="flops"), context=128)
    heads, kv_heads, dim = 4, 2, 8
    maps, state = 2 * (heads + kv_heads) * dim**2, 4 * heads * dim * (dim + 1)
    full = FullAttention(ExpertShape(heads, dim, 6)).flops_per_token(128)
    assert router.cost_ratio[1:3].tolist() == pytest.approx(
        [(state + maps) / full, (state + 2 * heads * dim + maps) / full]
    )
    timed = PriorConfig(cost="latency")
    assert (layer_costs(timed, router.config, 128, [None])[0] > 0).all()  # what is timed runs
    with torch.no_grad():
        q, k, v = (torch.randn(1, n, 20, dim) for n in (heads, kv_heads, kv_heads))
        call = AttentionCall(q, k, v, None, True, fused_attention, dim**-0.5)
        for counted, name in zip(router.counted_experts, names, strict=True):
            if name in ("mapped", "gated"):
                assert torch.equal(counted(q, k, v), EXPERTS[name](counted.shape, kv_heads)(call))
    router.save(tmp_path)
    file = tmp_path / "router.json"
    file.write_text(file.read_text().replace('"mapped"', '"linear"'))
    other = tiny("llama")
    again = load_patch(other, tmp_path)
    assert again.experts == names and torch.equal(other(tokens()).logits, model(tokens()).logits)
    with pytest.raises(
        ValueError, match="'mapped' for linear attention with a learned feature map"
    ):
        patch(tiny("llama"), experts=("full", "linear"))


def test_the_prior_of_each_unit_is_charged_and_priced_by_itself() -> None:
    """In the KL of a pass, and to the prior of the Pyro program."""
    ratio, charged = ((1.0, 3.0), (0.5, 2.0)), (((1.0, 0.2), (0.6, 0.5)),) * 2
    prior = PriorConfig(
        price=7.0,
        layer_total_concentration=((0.5, 2.0), (1.0, 3.0)),
        layer_cost_ratio=charged,
        layer_price_ratio=ratio,
    )
    _, router = patched("llama", experts=("full", "local"), route_by="kv_head", prior=prior)
    assert router.config.num_units == 2
    concentration = router(tokens()).concentration.flatten(1, 2).double()  # [L, N, R, E]
    costs, times = torch.tensor(charged), torch.tensor(ratio)
    expected = sum(
        _Prior(router.prior.concentration[i : i + 1, u], 7.0 * times[i, u] * costs[i, u])
        .kl(concentration[i : i + 1, :, u : u + 1])
        .mean()
        for i in range(2)
        for u in range(2)
    )
    torch.testing.assert_close(router.kl().double(), expected, rtol=1e-4, atol=1e-4)
    model, _ = router.program()  # concentrations are [L, N, R, E] there too
    of_program = sum(kl_to_prior(model, i, concentration[i].float()).sum(-1).mean() for i in (0, 1))
    torch.testing.assert_close(of_program, expected, rtol=1e-4, atol=1e-4)
