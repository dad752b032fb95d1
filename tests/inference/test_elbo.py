"""The objective by hand, by Pyro and by us: the same number and gradient."""

import copy

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from bayes_router.inference.elbo import NegativeELBO, RoutingELBO, tempered
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel, harden
from bayes_router.transformer.model import RoutedLanguageModel
from tests.inference.handwritten import negative_elbo
from tests.tiny import tiny_batch, tiny_concentration, tiny_config, tiny_model

COST = torch.tensor([1.0, 0.15, 0.3, 0.15])


def program(model: RoutedLanguageModel, price: float = 0.0) -> tuple[RoutingModel, RoutingGuide]:
    generative = RoutingModel(model.network, tiny_concentration(model.config), COST, price)
    return generative, RoutingGuide(generative, model.controller)


def posteriors(guide: RoutingGuide, tokens: Tensor, targets: Tensor | None = None) -> list[Tensor]:
    """Concentrations of each layer along one path of draws."""
    nodes = poutine.trace(guide).get_trace(tokens, targets).nodes
    return [nodes[f"route_{layer}"]["fn"].concentration for layer in range(3)]


def gradient(loss: Tensor, model: RoutedLanguageModel) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("kl_weight", [1.0, 0.01])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_the_handwritten_elbo_in_value_and_gradient(
    kl_weight: float, seed: int
) -> None:
    model = tiny_model(seed).double()
    tokens, targets = tiny_batch()
    prior = tiny_concentration(model.config)
    want, nll, kl = negative_elbo(model, prior, kl_weight, tokens, targets, seed=7)
    generative, guide = program(model)
    elbo = RoutingELBO(kl_weight)
    # of the tempered program's loss, nats of the batch over the weight
    scaled = kl_weight / tokens.numel()
    for objective, other, scale in (
        (elbo, generative, 1.0),
        (TraceMeanField_ELBO(), tempered(generative, kl_weight), scaled),
        (RoutingELBO(1.0), tempered(generative, kl_weight), kl_weight),
    ):
        torch.manual_seed(7)
        loss = objective(other, guide)(tokens, targets) * scale
        assert float(loss) == pytest.approx(float(want), rel=1e-6)
        true = gradient(negative_elbo(model, prior, kl_weight, tokens, targets, seed=7)[0], model)
        for name, got in gradient(loss, model).items():
            torch.testing.assert_close(got, true[name], rtol=1e-5, atol=1e-8, msg=name)
    assert elbo.terms is not None
    assert float(elbo.terms.nll) == pytest.approx(float(nll), rel=1e-6)
    assert float(elbo.terms.kl) == pytest.approx(float(kl), rel=1e-6)
    assert float(elbo.terms.elbo) == pytest.approx(-float(nll + kl), rel=1e-6)


def test_the_kl_weight_scales_the_kl_and_nothing_else() -> None:
    model, (tokens, targets) = tiny_model(), tiny_batch()
    losses = {}
    for weight in (1e-8, 0.5, 1.0):
        torch.manual_seed(0)
        losses[weight], terms = NegativeELBO(*program(model), weight)(tokens, targets)
    torch.testing.assert_close(losses[1.0] - losses[1e-8], terms.kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[0.5] - losses[1e-8], terms.kl / 2, rtol=1e-4, atol=1e-5)


def test_svi_and_the_module_form_agree_in_loss_and_gradient() -> None:
    tokens, targets = tiny_batch()
    model = tiny_model()
    generative, guide = program(model)
    torch.manual_seed(3)
    by_module = TraceMeanField_ELBO()(generative, guide)(tokens, targets)
    want = gradient(by_module, model)
    pyro.clear_param_store()
    generative, guide = program(model)
    seen: dict[str, Tensor] = {}

    svi = SVI(generative, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), TraceMeanField_ELBO())
    given: list[Tensor] = []

    def step(parameters: set[Tensor]) -> None:
        given.extend(parameters)
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    svi.optim = step
    torch.manual_seed(3)
    assert svi.step(tokens, targets) == pytest.approx(float(by_module), rel=1e-6)
    assert {id(p) for p in given} == {id(p) for p in model.parameters()}
    assert seen.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(seen[name], want[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO(), RoutingELBO()])
def test_svi_learns(elbo: TraceMeanField_ELBO) -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = tiny_model()
    tokens, _ = tiny_batch()
    generative, guide = program(model)
    svi = SVI(generative, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), elbo)
    losses = [svi.step(tokens, tokens) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_is_one_forward_pass() -> None:
    model, (tokens, targets) = tiny_model(), tiny_batch()
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    model.network.register_forward_hook(count)
    generative, guide = program(model)
    SVI(generative, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), TraceMeanField_ELBO()).step(
        tokens, targets
    )
    assert passes == 1
    NegativeELBO(generative, guide)(tokens, targets)
    assert passes == 2


def test_the_guide_never_sees_the_targets() -> None:
    model, (tokens, targets) = tiny_model(), tiny_batch()
    generative, guide = program(model)
    concentrations = []
    for y in (targets, (targets + 5) % 23):
        torch.manual_seed(0)
        concentrations.append(posteriors(guide, tokens, y))
    for a, b in zip(*concentrations, strict=True):
        assert torch.equal(a, b)


def test_concentrations_are_float32_under_autocast_and_the_loss_is_close() -> None:
    model, (tokens, targets) = tiny_model(), tiny_batch()
    generative, guide = program(model)
    torch.manual_seed(0)
    exact, _ = NegativeELBO(generative, guide)(tokens, targets)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = NegativeELBO(generative, guide)(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = poutine.trace(guide).get_trace(tokens).nodes["route_0"]
    assert drawn["fn"].concentration.dtype == drawn["value"].dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.05)


def test_two_models_and_a_copy_share_no_parameters() -> None:
    """A step on one moves every one of its parameters, and none of another's."""
    pyro.clear_param_store()
    tokens, targets = tiny_batch()
    first, second = program(tiny_model(0)), program(tiny_model(1))
    copied = copy.deepcopy(second[0])
    programs = [first, second, (copied, RoutingGuide(copied, tiny_model(2).controller))]
    for moving, (model, guide) in enumerate(programs):
        before = [[p.clone() for module in pair for p in module.parameters()] for pair in programs]
        SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1}), TraceMeanField_ELBO()).step(
            tokens, targets
        )
        after = [[p for module in pair for p in module.parameters()] for pair in programs]
        for other in range(3):
            same = [torch.equal(a, b) for a, b in zip(before[other], after[other], strict=True)]
            assert not any(same) if other == moving else all(same)


def test_the_module_form_of_ours_leaves_the_parameter_store_alone() -> None:
    pyro.clear_param_store()
    NegativeELBO(*program(tiny_model()))(*tiny_batch())
    assert len(pyro.get_param_store()) == 0
    assert pyro.settings.get("module_local_params") is False


def test_unscored_targets_carry_no_loss() -> None:
    model, (tokens, targets) = tiny_model(), tiny_batch()
    objective = NegativeELBO(*program(model))
    half = targets.clone()
    half[:, 20:] = -100
    torch.manual_seed(0)
    _, some = objective(tokens, half)
    torch.manual_seed(0)
    _, first = objective(tokens[:, :20], targets[:, :20])
    assert 0 < float(some.nll) < float(first.nll)
    torch.manual_seed(0)
    _, none = objective(tokens, torch.full_like(targets, -100))
    assert float(none.nll) == 0.0


def test_predictive_draws_routes_and_targets() -> None:
    model, (tokens, _) = tiny_model(), tiny_batch()
    generative, guide = program(model)
    draws = Predictive(generative, guide=guide, num_samples=3)(tokens)
    assert draws["targets"].shape == (3, 2, 40)
    assert draws["route_1"].shape == (3, 2, 40, 4)
    torch.testing.assert_close(draws["route_1"].sum(-1), torch.ones(3, 2, 40))


def test_a_price_tilts_the_prior() -> None:
    """The KL to a tilted prior, with its normaliser by independent draws.

    KL(q || tilted) = KL(q || Dirichlet) + price . E_q[cost] + log Z.
    """
    model, (tokens, targets) = tiny_model(), tiny_batch()
    generative, guide = program(model, price=4.0)
    torch.manual_seed(0)
    loss, tilted = NegativeELBO(generative, guide)(tokens, targets)
    torch.manual_seed(0)
    q = torch.stack(posteriors(guide, tokens))
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=True):
        by_pyro = TraceMeanField_ELBO()(generative, guide)(tokens, targets)
    torch.testing.assert_close(loss, by_pyro / tokens.numel())
    torch.manual_seed(0)
    _, plain = NegativeELBO(*program(model))(tokens, targets)
    priors = torch.distributions.Dirichlet(tiny_concentration(model.config).double())
    draws = priors.sample(torch.Size([200_000]))
    log_z = (-4.0 * (draws @ COST.double())).exp().mean(0).log().sum()
    expected_cost = ((q / q.sum(-1, keepdim=True)) @ COST).mean((1, 2)).sum()
    assert float(tilted.kl - plain.kl) == pytest.approx(
        float(4.0 * expected_cost + log_z), abs=0.01
    )
    assert float(tilted.nll) == pytest.approx(float(plain.nll))


def test_the_tilted_prior_samples_what_its_density_says() -> None:
    model = tiny_model()
    prior = program(model, price=6.0)[0].prior(0)
    torch.manual_seed(0)
    draws = prior.expand(torch.Size([20_000])).sample()
    base = torch.distributions.Dirichlet(tiny_concentration(model.config)[0]).sample(
        torch.Size([50_000])
    )
    weight = (-6.0 * (base @ COST)).softmax(0)
    torch.testing.assert_close(draws.mean(0), weight @ base, rtol=0.05, atol=0.01)


def test_straight_through_executes_one_expert_with_the_gradient_of_the_draw() -> None:
    model, (tokens, targets) = tiny_model(), tiny_batch()
    generative, guide = program(model)
    generative.straight_through = True
    routes = []
    inner = model.network.forward
    model.network.forward = lambda tokens, route: inner(
        tokens, lambda i, h: routes.append(route(i, h)) or routes[-1]
    )  # type: ignore
    loss, _ = NegativeELBO(generative, guide)(tokens, targets)
    for route in routes:
        assert torch.equal(
            route.detach().sort(-1).values[..., :-1].abs() < 1e-6,
            torch.ones(2, 40, 3, dtype=torch.bool),
        )
    assert float(gradient(loss, model)["controller.layers.0.out.weight"].norm()) > 0
    draw, weight = torch.rand(5, 3, requires_grad=True), torch.randn(5, 3)
    hard = harden(draw)
    assert torch.equal(
        hard.detach().round(), torch.nn.functional.one_hot(draw.argmax(-1), 3).float()
    )
    (hard * weight).sum().backward()
    assert torch.equal(draw.grad, weight)  # of the draw, as if nothing had been rounded


@pytest.mark.parametrize(
    ("concentration", "price", "field"),
    [
        (torch.ones(4), 0.0, "concentration"),
        (torch.zeros(3, 4), 0.0, "concentration"),
        (torch.ones(3, 4), -1.0, "price"),
        (torch.ones(3, 4), 1.0, "price"),
        (torch.ones(3, 3), 0.0, "prior"),
    ],
)
def test_bad_priors_are_refused_by_name(concentration: Tensor, price: float, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        RoutingModel(tiny_model().network, concentration, None, price)


def test_the_kl_weight_is_positive_and_has_one_setter() -> None:
    generative, guide = program(tiny_model())
    for make in (
        RoutingELBO,
        lambda w: tempered(generative, w),
        lambda w: NegativeELBO(generative, guide, w),
    ):
        with pytest.raises(ValueError, match="^kl_weight: expected a positive number; got 0.0"):
            make(0.0)
    for holder in (generative, RoutingELBO(), NegativeELBO(generative, guide)):
        with pytest.raises(AttributeError):
            holder.kl_weight = 0.5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        generative.price = 1.0  # type: ignore[misc]


def test_the_sampled_elbo_of_pyro_has_the_same_mean() -> None:
    """Trace_ELBO estimates the KL by sampling: another estimator of the same number."""
    config = tiny_config(concentration_floor=1.0)
    torch.manual_seed(0)
    model = RoutedLanguageModel(config)
    generative = RoutingModel(model.network, torch.ones(3, 4), COST)
    guide = RoutingGuide(generative, model.controller)
    tokens, targets = tiny_batch(T=20)
    torch.manual_seed(0)
    with torch.no_grad(), pyro.settings.context(module_local_params=True):
        analytic = torch.stack(
            [RoutingELBO()(generative, guide)(tokens, targets) for _ in range(30)]
        )
        sampled = torch.stack([Trace_ELBO()(generative, guide)(tokens, targets) for _ in range(30)])
    error = (analytic.var() / 30 + sampled.var() / 30).sqrt()
    assert abs(float(analytic.mean() - sampled.mean())) < 4 * float(error)
    assert float(analytic.std()) < float(sampled.std())
