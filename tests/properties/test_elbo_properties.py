"""The objective for any shape, mask, prior and dtype.

The hand-written value, finite gradients, the edges of its numbers.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Dirichlet, kl_divergence

from bayes_router.inference.draws import RowDraws
from bayes_router.inference.elbo import NegativeELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.posterior import dirichlet_kl, posterior
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import IGNORED, RoutingMode
from tests.inference.handwritten import negative_elbo
from tests.tiny import EXPERTS, tiny_batch, tiny_concentration, tiny_config, tiny_model

quick = settings(max_examples=20, deadline=None, derandomize=True)
experts = st.permutations(EXPERTS).flatmap(
    lambda names: st.integers(1, 4).map(lambda n: tuple(names[:n]))
)
weights = st.floats(1e-4, 2.0)


def objective(
    model: RoutedLanguageModel, prior: torch.Tensor, kl_weight: float = 0.1, price: float = 0.0
) -> NegativeELBO:
    cost = torch.linspace(1.0, 0.2, len(model.config.experts))
    program = RoutingModel(model.network, prior, cost, price)
    return NegativeELBO(program, RoutingGuide(program, model.controller), kl_weight)


@quick
@given(
    st.integers(1, 3), st.integers(1, 24), experts, st.integers(1, 50), weights, st.integers(0, 99)
)
def test_the_loss_is_the_handwritten_one(
    B: int, T: int, names: tuple[str, ...], window: int, kl: float, seed: int
) -> None:
    model = tiny_model(seed, experts=names, window=window, num_layers=2).double()
    tokens, targets = tiny_batch(B, T, seed=seed)
    prior = tiny_concentration(model.config)
    torch.manual_seed(seed)
    loss, terms = objective(model, prior, kl)(tokens, targets)
    want, nll, total = negative_elbo(model, prior, kl, tokens, targets, seed)
    assert float(loss) == pytest.approx(float(want), rel=1e-5, abs=1e-7)
    assert float(terms.nll) == pytest.approx(float(nll), rel=1e-5)
    assert float(terms.kl) == pytest.approx(float(total), rel=1e-5, abs=1e-7)


@quick
@given(st.integers(1, 3), st.integers(1, 20), st.data())
def test_masked_targets_count_for_nothing(B: int, T: int, data: st.DataObject) -> None:
    model, (tokens, targets) = tiny_model(num_layers=2), tiny_batch(B, T)
    hidden = torch.tensor([[data.draw(st.booleans()) for _ in range(T)] for _ in range(B)])
    masked = targets.masked_fill(hidden, IGNORED)
    prior = tiny_concentration(model.config)
    torch.manual_seed(0)
    loss, terms = objective(model, prior)(tokens, masked)
    torch.manual_seed(0)
    _, whole = objective(model, prior)(tokens, targets)
    torch.manual_seed(0)
    logits = model(tokens, RoutingMode.SAMPLE).logits
    summed = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), masked.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert float(terms.nll) == pytest.approx(float(summed) / (B * T), rel=1e-4, abs=1e-6)
    # the routes of unscored tokens have a KL too
    assert float(terms.kl) == pytest.approx(float(whole.kl), rel=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@quick
@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 99), st.data())
def test_draws_by_row_do_not_hang_on_the_batch(
    B: int, T: int, seed: int, data: st.DataObject
) -> None:
    model, (tokens, targets) = tiny_model(seed).double(), tiny_batch(B, T, seed=seed)
    some = sorted(data.draw(st.sets(st.integers(0, B - 1), min_size=1)))
    program = objective(model, tiny_concentration(model.config))

    def nll(rows: list[int]) -> float:
        with RowDraws([1000 + row for row in rows]):
            return float(program(tokens[rows], targets[rows])[1].nll)

    alone = [nll([row]) for row in some]
    assert nll(some) == pytest.approx(sum(alone) / len(alone), rel=1e-9)


# The edges of the numbers


EDGES = [1e-3, 1e-2, 0.1, 1.0, 100.0, 1e4]


@pytest.mark.parametrize("q", EDGES)
@pytest.mark.parametrize("p", EDGES)
def test_kl_and_its_gradient_hold_from_a_thousandth_to_ten_thousand(q: float, p: float) -> None:
    concentration = torch.tensor([q, 1.3 * q, 0.5 * q], requires_grad=True)
    prior = torch.tensor([p, p, 2 * p])
    kl = dirichlet_kl(concentration, prior)
    exact = kl_divergence(Dirichlet(concentration.detach().double()), Dirichlet(prior.double()))
    # lgamma of 1e4 is 8e4, of which float32 keeps seven digits
    assert float(kl) == pytest.approx(
        float(exact), rel=2e-3, abs=2e-2 if max(p, q) >= 100 else 1e-3
    )
    kl.backward()
    assert torch.isfinite(concentration.grad).all()  # type: ignore[arg-type]
    tilted = TiltedDirichlet(prior, torch.tensor([10.0, 1.5, 3.0]))
    assert torch.isfinite(kl_divergence(Dirichlet(concentration), tilted))


@pytest.mark.parametrize("scale", EDGES)
def test_draws_and_their_gradients_are_finite_at_the_edges(scale: float) -> None:
    torch.manual_seed(0)
    concentration = torch.full((2000, 3), scale, requires_grad=True)
    draws = Dirichlet(concentration, validate_args=False).rsample()
    assert torch.isfinite(draws).all()
    torch.testing.assert_close(draws.sum(-1), torch.ones(2000), rtol=1e-4, atol=1e-4)
    (draws * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    assert torch.isfinite(concentration.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [-1e4, -200.0, -30.0, 0.0, 30.0, 1e4])
def test_the_posterior_is_proper_whatever_the_controller_says(raw: float) -> None:
    concentration = posterior(torch.tensor([raw, -raw, 0.0]), 0.01).concentration
    assert torch.isfinite(concentration).all() and bool((concentration >= 0.01).all())


@pytest.mark.parametrize("total", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("price", [0.0, 10.0, 1000.0])
def test_a_step_is_finite_at_the_edges_of_prior_and_price(total: float, price: float) -> None:
    model, (tokens, targets) = tiny_model(), tiny_batch()
    prior = tiny_concentration(model.config)
    prior = total * prior / prior.sum(-1, keepdim=True)
    loss, _ = objective(model, prior, 1.0, price)(tokens, targets)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_network_leaves_the_objective_in_float32(dtype: torch.dtype) -> None:
    model, (tokens, targets) = tiny_model(), tiny_batch()
    with torch.autocast("cpu", dtype):
        torch.manual_seed(0)
        loss, terms = objective(model, tiny_concentration(model.config))(tokens, targets)
    loss.backward()
    torch.manual_seed(0)
    exact, _ = objective(model, tiny_concentration(model.config))(tokens, targets)
    assert loss.dtype == torch.float32 and terms.kl.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


SHAPES = [
    pytest.param({}, 1, 1, id="one token, batch 1"),
    pytest.param({"experts": ("gated",)}, 2, 9, id="one expert"),
    pytest.param({"window": 500}, 2, 9, id="window beyond the text"),
    pytest.param({"window": 1}, 2, 9, id="window of the token itself"),
    pytest.param(
        {"num_layers": 1, "controller_hidden": 0}, 1, 70, id="one layer, linear controller"
    ),
]


@pytest.mark.parametrize(("changes", "B", "T"), SHAPES)
def test_small_shapes_train_and_run_in_every_mode(
    changes: dict[str, object], B: int, T: int
) -> None:
    model, (tokens, targets) = tiny_model(**changes), tiny_batch(B, T)
    loss, _ = objective(model, tiny_concentration(model.config))(tokens, targets)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    for mode in RoutingMode:
        assert torch.isfinite(model(tokens, mode).logits).all()


@pytest.mark.parametrize("name", EXPERTS)
def test_all_tokens_on_one_expert(name: str) -> None:
    model, (tokens, _) = tiny_model(), tiny_batch()
    index = EXPERTS.index(name)
    hard = model(tokens, force=torch.full((3, *tokens.shape), index)).logits
    soft = model(
        tokens, force=torch.nn.functional.one_hot(torch.full((3, *tokens.shape), index), 4).float()
    ).logits
    torch.testing.assert_close(hard, soft, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_that_no_token_took_for_long_is_ready_when_one_does(name: str) -> None:
    """3,000 tokens of another expert through the cache, then one of this: as in the full pass."""
    model = tiny_model(num_layers=2, num_kv_heads=4)
    T, index = 3000, EXPERTS.index(name)
    tokens, _ = tiny_batch(1, T)
    route = torch.full((2, 1, T), EXPERTS.index("local" if name != "local" else "gated"))
    route[:, :, -1] = index
    with torch.no_grad():
        whole = model(tokens, force=route, last_only=True).logits
        cache = model.network.new_cache(1, T)
        for a, b in ((0, 1500), (1500, T - 1), (T - 1, T)):
            last = model(tokens[:, a:b], force=route[:, :, a:b], cache=cache, last_only=True).logits
    assert torch.isfinite(last).all()
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-3)


def test_settings_of_one_expert_are_a_model() -> None:
    assert RoutedLanguageModel(tiny_config(experts=("full",)))(tiny_batch()[0]).route.max() == 0
