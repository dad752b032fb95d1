"""The evaluation against figures computed by hand from the model's own outputs."""

import pytest
import torch
from torch.distributions import Categorical, Dirichlet, kl_divergence
from torch.nn import functional as F

from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.data.recall import RecallData
from bayes_router.data.tokenisers import ByteTokeniser
from bayes_router.data.tokens import TokenDataset
from bayes_router.diagnostics.measures.amortisation import amortisation_gap
from bayes_router.inference.elbo import NegativeELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.policy import Budget
from bayes_router.training.evaluate import evaluate
from bayes_router.transformer.build import build_experts, build_prior
from bayes_router.transformer.model import RoutedLanguageModel
from tests.tiny import tiny_concentration, tiny_model

COST = torch.tensor([1.0, 0.15, 0.3, 0.15])


def source(length: int = 2000) -> TokenDataset:
    text = bytes(torch.randint(23, (length,), generator=torch.Generator().manual_seed(0)).tolist())
    return TokenDataset([text], ByteTokeniser())


def test_every_figure_by_hand() -> None:
    model, prior = tiny_model(), tiny_concentration(tiny_model().config)
    text = source()
    result = evaluate(model, text, prior, context=40, batch_size=5, limit=400)
    batches = list(text.windows(40, 10, 400))
    tokens, targets = batches[0]
    assert result.tokens == 400 == tokens.numel()
    with torch.no_grad():
        hard, mean = model(tokens, "hard"), model(tokens, "mean")
    for mode, out in (("hard", hard), ("mean", mean)):
        assert result.nll[mode] == pytest.approx(
            float(F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())), rel=1e-4
        )
    assert result.gap == pytest.approx(result.nll["hard"] - result.nll["mean"])
    assert result.accuracy == pytest.approx(
        float((hard.logits.argmax(-1) == targets).float().mean()), abs=0.003
    )
    load = F.one_hot(hard.route, 4).float().mean((1, 2, 3))
    torch.testing.assert_close(torch.tensor(result.load_per_layer), load, rtol=1e-4, atol=0.003)
    assert result.executed_cost["paper"] == pytest.approx(float((load @ COST).mean()), abs=0.002)
    flops = torch.tensor([e.flops_per_token(40) for e in build_experts(model.config)])
    assert result.executed_cost["flops"] == pytest.approx(
        float((load @ (flops / flops[0])).mean()), abs=0.01
    )
    concentration = hard.concentration[:, :, :, 0]  # of the one unit
    p = Categorical(concentration / concentration.sum(-1, keepdim=True))
    information = Categorical(p.probs.mean((1, 2))).entropy() - p.entropy().mean((1, 2))
    torch.testing.assert_close(
        torch.tensor(result.route_information_per_layer), information, rtol=1e-2, atol=1e-3
    )
    of_context = torch.zeros(3)
    for token in tokens.unique():
        same = p.probs[:, tokens == token]
        of_context += same.shape[1] / 400 * Categorical(same.mean(1)).entropy()
    torch.testing.assert_close(
        torch.tensor(result.context_information_per_layer),
        of_context - p.entropy().mean((1, 2)),
        rtol=1e-2,
        atol=1e-3,
    )
    total = concentration.sum(-1).mean((1, 2))
    torch.testing.assert_close(
        torch.tensor(result.total_concentration_per_layer), total, rtol=1e-3, atol=1e-3
    )


def test_executed_costs_are_counted_token_by_token() -> None:
    """Each token at its own position, each state of every token, of the whole model too."""
    model, T = tiny_model(), 40
    result = evaluate(
        model, source(), tiny_concentration(model.config), context=T, batch_size=5, limit=400
    )
    L, H, Dh, Hkv = 3, 4, 4, 2
    tokens, _ = next(source().windows(T, 10, 400))
    with torch.no_grad():
        route = model(tokens, "hard").route[..., 0]  # [L, B, T]
    pair, state = 4 * H * Dh, Dh * (Dh + 1)
    # full, linear, local, gated
    at = [[pair * (t + 1), 2 * H * state, pair * min(t + 1, 5), 2 * H * state] for t in range(T)]
    shared = 2 * Hkv * state + 2 * H * state + 2 * H * Dh
    own = sum(at[t][e] for rows in route.tolist() for row in rows for t, e in enumerate(row)) / (
        10 * T
    )
    full = L * sum(row[0] for row in at) / T
    prefill, step = result.executed["attention_prefill"], result.executed["attention_decode"]
    assert prefill["flops"] == pytest.approx((own + L * shared) / full, rel=1e-3)
    load = F.one_hot(route, 4).double().mean((0, 1, 2))
    last = float(load @ torch.tensor(at[-1]).double())
    assert step["flops"] == pytest.approx((last + shared) / at[-1][0], rel=1e-3)
    kept = 2 * 4 * (Hkv + H) * state  # states read and written
    token = 2 * 4 * Hkv * Dh
    read = float(load[0] * T + load[2] * 5) * token
    assert step["bytes"] == pytest.approx((read + token + kept) / ((T + 1) * token), rel=1e-3)
    rest = 2 * sum(
        p.numel()
        for n, p in model.network.named_parameters()
        if p.dim() == 2 and "experts" not in n
    )
    controllers = 2 * sum(p.numel() for p in model.controller.parameters() if p.dim() == 2)
    whole = result.executed["model_prefill"]
    assert whole["mflops"] == pytest.approx((own + L * shared + rest + controllers) / 1e6, rel=1e-3)
    assert whole["flops"] == pytest.approx(
        (own + L * shared + rest + controllers) / (full + rest), rel=1e-3
    )
    assert f"attention FLOPs {prefill['flops']:.3f}, decoding {step['flops']:.3f}" in result.table()


def test_the_elbo_carries_the_kl_at_weight_one() -> None:
    model = tiny_model()
    prior = tiny_concentration(model.config)
    text = source()
    result = evaluate(model, text, prior, context=40, batch_size=10, limit=400, seed=3)
    tokens, _ = next(text.windows(40, 10, 400))
    torch.manual_seed(3)
    with torch.no_grad():
        model(tokens, "sample" if list(result.nll)[0] == "sample" else "mean")
    assert result.elbo == pytest.approx(
        -(result.nll["sample"] + sum(result.kl_per_layer)), rel=1e-6
    )
    # SAMPLE and HARD see the same hidden states in layer 0, so its KL can be computed from either
    concentration = model(tokens, "hard").concentration[0].detach()
    kl = kl_divergence(
        Dirichlet(concentration), Dirichlet(prior[0].expand_as(concentration))
    ).mean()
    assert result.kl_per_layer[0] == pytest.approx(float(kl), rel=1e-4)


def test_the_kl_is_of_the_posteriors_that_draws_lead_to() -> None:
    """Above layer 0 a posterior hangs on the routes below it.

    Those of SAMPLE, by which the objective is read, too.
    """
    model = tiny_model()
    prior = tiny_concentration(model.config)
    text = source()
    result = evaluate(model, text, prior, context=40, batch_size=10, limit=400, seed=3)
    tokens, _ = next(text.windows(40, 10, 400))
    torch.manual_seed(3)  # SAMPLE comes first
    q = model(tokens, "sample").concentration.detach().double()
    want = kl_divergence(
        Dirichlet(q), Dirichlet(prior.double()[:, None, None, None].expand_as(q))
    ).mean((1, 2, 3))
    assert result.kl_per_layer == pytest.approx(want.tolist(), rel=1e-5)
    hard = model(tokens, "hard").concentration.detach().double()
    other = kl_divergence(
        Dirichlet(hard), Dirichlet(prior.double()[:, None, None, None].expand_as(q))
    ).mean((1, 2, 3))
    assert (want - other)[1:].abs().min() > 1e-3  # so that the line above can tell them apart


def test_a_tilted_prior_is_what_the_kl_is_measured_from() -> None:
    """By the same KL of the Pyro distribution, and by its own definition."""
    model = tiny_model()
    prior, price = tiny_concentration(model.config), 4.0 * COST
    plain, tilted = (
        evaluate(model, source(), prior, prior_tilt=p, context=40, batch_size=10, limit=400)
        for p in (None, price)
    )
    draws = Dirichlet(prior.double()).sample(torch.Size([100_000]))  # [S, L, E]
    log_z = (-(draws @ price.double())).exp().mean(0).log()
    tokens, _ = next(source().windows(40, 10, 400))
    # layer 0 is the same in every mode
    concentration = model(tokens, "hard").concentration[0].detach().double()
    expected = (
        concentration / concentration.sum(-1, keepdim=True) @ price.double()
    ).mean() + log_z[0]
    assert tilted.kl_per_layer[0] - plain.kl_per_layer[0] == pytest.approx(
        float(expected), abs=0.01
    )
    kl = kl_divergence(
        Dirichlet(concentration),
        TiltedDirichlet(prior[0].double(), price.double()).expand(concentration.shape[:3]),
    )
    assert tilted.kl_per_layer[0] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert tilted.elbo == pytest.approx(-(tilted.nll["sample"] + sum(tilted.kl_per_layer)))


def test_it_repeats_and_leaves_the_caller_as_it_was() -> None:
    model = tiny_model().train()
    state, policy = torch.random.get_rng_state(), model.policy
    prior = tiny_concentration(model.config)
    first, second = (
        evaluate(model, source(), prior, context=40, batch_size=4, limit=200) for _ in range(2)
    )
    assert first == second
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training and model.policy is policy


def test_a_policy_moves_the_cost() -> None:
    model = tiny_model()
    prior = tiny_concentration(model.config)
    costs = [
        evaluate(
            model,
            source(),
            prior,
            context=40,
            batch_size=4,
            limit=200,
            policy=Budget(tuple(COST.tolist()), price),
        ).executed_cost
        for price in (-50.0, 0.0, 50.0)
    ]
    assert costs[0]["paper"] > costs[1]["paper"] > costs[2]["paper"]
    assert costs[0]["paper"] == pytest.approx(1.0)
    assert costs[2]["paper"] == pytest.approx(0.15, abs=0.005)


def test_the_table_reads_as_the_numbers() -> None:
    model = tiny_model()
    result = evaluate(
        model, source(), tiny_concentration(model.config), context=40, batch_size=4, limit=200
    )
    table = result.table()
    assert f"HARD {result.nll['hard']:.4f}" in table and "200 tokens" in table
    assert len(result.layers()) == 3


def test_bounds_of_texts_with_unscored_targets_are_the_objective() -> None:
    """Recall scores few of its tokens.

    The nll of an ELBO is spread over all of them, as its KL is.
    """
    data = RecallData()
    config = ModelConfig(data.vocab_size, d_model=32, num_layers=2, num_heads=2)
    torch.manual_seed(0)
    model, prior = RoutedLanguageModel(config), build_prior(PriorConfig(), config, 2, 128)
    read = evaluate(
        model,
        data,
        prior.concentration,
        prior_tilt=2 * prior.cost_ratio,
        context=96,
        batch_size=8,
        limit=96 * 32,
    )
    program = RoutingModel(model.network, prior.concentration, prior.cost_ratio, 2.0)
    guide = RoutingGuide(program, model.controller)
    objective, terms = NegativeELBO(program, guide), []
    with torch.no_grad():
        for batch in data.windows(96, 8, 96 * 32):
            terms.append(objective(batch.tokens, batch.targets)[1])
    elbo, nll = (
        torch.stack([getattr(one, name) for one in terms]).mean() for name in ("elbo", "nll")
    )
    assert read.elbo == pytest.approx(float(elbo), abs=0.02)
    assert read.nll["sample"] > 1.5 * float(nll)  # per scored token
    batch = next(data.windows(96, 4))
    gap = amortisation_gap(program, guide, batch.tokens, batch.targets, steps=1, draws=4)
    with torch.no_grad():
        mean = torch.stack(
            [objective(batch.tokens, batch.targets)[1].elbo for _ in range(8)]
        ).mean()
    assert gap.bound_controller == pytest.approx(float(mean), abs=0.03)


def test_the_tilt_is_served_by_its_name_of_before() -> None:
    model, prior, tilt = tiny_model(), tiny_concentration(tiny_model().config), 3 * COST

    def elbo(**priced: torch.Tensor) -> float:
        return evaluate(model, source(), prior, context=40, batch_size=5, limit=200, **priced).elbo

    with pytest.warns(FutureWarning, match="is called prior_tilt now"):
        assert elbo(prior_price=tilt) == elbo(prior_tilt=tilt) != elbo()
