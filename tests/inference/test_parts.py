"""Parts of one's own: prior, likelihood, controller, units."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMessenger
from torch import Tensor
from torch.distributions import kl_divergence

from bayes_router.inference.elbo import RoutingELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.likelihood import ExpectedToken, NextToken, Teacher
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.tilted import TiltedDirichlet
from tests.diagnostics.toy import THETA, BlindNetwork, MixtureNetwork, toy
from tests.inference.closed import (
    PRIOR,
    TARGETS,
    TOKENS,
    Q,
    UnitController,
    UnitNetwork,
    hand_written,
    mixture,
)

N = TOKENS.numel()
CONTROLLER = toy(MixtureNetwork(), torch.tensor([PRIOR]), torch.tensor([Q]))[1].controller


@pytest.fixture(autouse=True)
def fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def loss(elbo: Trace_ELBO, model: RoutingModel, guide: object, targets: Tensor = TARGETS) -> float:
    pyro.set_rng_seed(7)
    return float(elbo.loss(model, guide, TOKENS, targets))


# The prior


def by_position(layer: int, shape: torch.Size) -> dist.TorchDistribution:
    """Later tokens are sent to the second expert."""
    later = torch.linspace(0.5, 3.0, shape[-1])
    return dist.Dirichlet(torch.stack([4 - later, later], -1).expand(*shape, 2))


def test_a_prior_for_each_position_has_the_sum_of_their_kls() -> None:
    guide_of = RoutingModel(BlindNetwork(), by_position)
    guide = RoutingGuide(guide_of, CONTROLLER)
    nll = -float(THETA[0, TARGETS].log().sum())
    kl = float(
        kl_divergence(dist.Dirichlet(torch.tensor(Q)), by_position(0, torch.Size([2, 3]))).sum()
    )
    assert loss(RoutingELBO(), guide_of, guide) == pytest.approx(nll + kl, rel=1e-5)
    assert loss(TraceMeanField_ELBO(), guide_of, guide) == pytest.approx(nll + kl, rel=1e-5)
    assert loss(RoutingELBO(0.1), guide_of, guide) * N == pytest.approx(nll + 0.1 * kl, rel=1e-5)


def test_tilts_that_differ_by_position_too() -> None:
    tilt = torch.stack([torch.linspace(0, 9, 3), torch.zeros(3)], -1).expand(2, 3, 2)

    def prior(layer: int, shape: torch.Size) -> dist.TorchDistribution:
        return TiltedDirichlet(torch.tensor(PRIOR).expand(*shape, 2), tilt)

    model = RoutingModel(BlindNetwork(), prior)
    guide = RoutingGuide(model, CONTROLLER)
    kl = sum(
        float(
            kl_divergence(
                dist.Dirichlet(torch.tensor(Q)), TiltedDirichlet(torch.tensor(PRIOR), row)
            )
        )
        for row in tilt.flatten(0, 1)
    )
    nll = -float(THETA[0, TARGETS].log().sum())
    assert loss(RoutingELBO(), model, guide) == pytest.approx(nll + kl, rel=1e-5)


class Squashed(dist.TorchDistribution):
    """A prior with no analytic KL: (s, 1 - s) with s ~ Beta(2, 2), its density written out."""

    support, arg_constraints, has_rsample = torch.distributions.constraints.simplex, {}, False  # type: ignore[var-annotated]

    def __init__(self, shape: torch.Size = torch.Size()):  # noqa: B008
        super().__init__(shape, torch.Size([2]), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "Squashed":
        return Squashed(torch.Size(batch_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return dist.Dirichlet(torch.full((*self.batch_shape, 2), 2.0)).sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.log(6 * value[..., 0] * value[..., 1])


def test_a_prior_without_an_analytic_kl_is_left_to_pyros_estimator() -> None:
    model = RoutingModel(BlindNetwork(), lambda layer, shape: Squashed())
    guide = RoutingGuide(model, CONTROLLER)
    assert loss(RoutingELBO(), model, guide) == pytest.approx(
        loss(TraceMeanField_ELBO(), model, guide), rel=1e-5
    )
    kl = N * float(
        kl_divergence(dist.Dirichlet(torch.tensor(Q)), dist.Dirichlet(torch.tensor([2.0, 2.0])))
    )
    nll = -float(THETA[0, TARGETS].log().sum())
    elbo = RoutingELBO(0.3, num_particles=4000, vectorize_particles=True)
    assert loss(elbo, model, guide) * N == pytest.approx(nll + 0.3 * kl, abs=0.1)


# The likelihood


def test_a_label_for_each_row() -> None:
    label = torch.tensor([[1], [2]])
    model = RoutingModel(
        MixtureNetwork(),
        torch.tensor([PRIOR]),
        likelihood=lambda output: dist.Categorical(logits=output.mean(1, keepdim=True)),
    )
    trace = poutine.trace(model).get_trace(TOKENS, label)
    trace.compute_log_prob()
    output = (trace.nodes["route_0"]["value"] @ THETA).log().mean(1)
    exact = dist.Categorical(logits=output).log_prob(label[:, 0])
    torch.testing.assert_close(trace.nodes["targets"]["log_prob"][:, 0], exact)
    assert [f.name for f in trace.nodes["targets"]["cond_indep_stack"]] == ["batch"]
    unscored = poutine.trace(model).get_trace(TOKENS, torch.tensor([[1], [-100]]))
    unscored.compute_log_prob()
    assert (
        float(unscored.nodes["targets"]["log_prob"][1])
        == 0.0
        != float(unscored.nodes["targets"]["log_prob"][0])
    )


@pytest.mark.parametrize("integer", [False, True])
def test_a_regression_for_each_token(integer: bool) -> None:
    real = torch.tensor([[-3, 2, 0], [-1, -7, 5]]) if integer else torch.randn(2, 3)
    model = RoutingModel(
        MixtureNetwork(),
        torch.tensor([PRIOR]),
        likelihood=lambda out: dist.Normal(out[..., 0], 2.0),
    )
    trace = poutine.trace(model).get_trace(TOKENS, real)
    trace.compute_log_prob()
    mean = (trace.nodes["route_0"]["value"] @ THETA).log()[..., 0]
    torch.testing.assert_close(
        trace.nodes["targets"]["log_prob"], dist.Normal(mean, 2.0).log_prob(real)
    )


def test_a_label_for_each_row_in_vectorised_particles() -> None:
    label = torch.tensor([[1], [2]])

    def said(output: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=output.mean(-2, keepdim=True))

    model = RoutingModel(MixtureNetwork(), torch.tensor([PRIOR]), likelihood=said)
    guide = RoutingGuide(model, CONTROLLER)
    both = [
        loss(RoutingELBO(num_particles=n, vectorize_particles=v), model, guide, label)
        for n, v in ((3000, True), (300, False))
    ]
    assert both[0] == pytest.approx(both[1], abs=0.05)


def test_a_teachers_distribution_is_its_expected_log_likelihood() -> None:
    logits, teacher = torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    exact = (teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(ExpectedToken(logits, teacher).log_prob(TARGETS), exact)
    torch.testing.assert_close(
        ExpectedToken(logits, teacher).expand(torch.Size([4, 2, 3])).log_prob(TARGETS)[2], exact
    )
    seen = logits.log_softmax(-1).gather(-1, TARGETS[..., None])[..., 0]
    both = ExpectedToken(logits, teacher, text=0.3).expand(torch.Size([1, 2, 3]))
    torch.testing.assert_close(both.log_prob(TARGETS[None])[0], 0.3 * seen + 0.7 * exact)
    likelihood = Teacher()
    torch.testing.assert_close(
        likelihood(logits).log_prob(TARGETS), NextToken(logits).log_prob(TARGETS)
    )
    likelihood.logits = teacher
    torch.testing.assert_close(likelihood(logits).log_prob(TARGETS), exact)


# The guide


def test_a_controller_of_ones_own_need_not_be_dirichlet() -> None:
    class Fixed:
        def posterior(self, layer: int, hidden: Tensor) -> dist.TorchDistribution:
            return dist.Delta(torch.tensor([0.25, 0.75]).expand(*hidden.shape[:-1], 2), event_dim=1)

    model, _ = mixture()
    found = loss(RoutingELBO(), model, RoutingGuide(model, Fixed()))
    route = torch.tensor([0.25, 0.75])
    exact = (
        dist.Dirichlet(torch.tensor(PRIOR)).log_prob(route) * N
        + (route @ THETA)[TARGETS].log().sum()
    )
    assert found == pytest.approx(-float(exact), rel=1e-5)


def test_a_guide_that_runs_inside_the_model() -> None:
    """Pyro's effect-based guides; also with a weight on the KL."""

    class Inside(AutoMessenger):
        def get_posterior(self, name: str, prior: object) -> dist.Dirichlet:
            return dist.Dirichlet(torch.tensor(Q))

    model, ours = mixture()
    for weight in (1.0, 0.3):
        elbo = RoutingELBO(weight, num_particles=3)
        assert loss(elbo, model, Inside(model)) == pytest.approx(loss(elbo, model, ours), rel=1e-5)


def test_hand_written_guides_take_the_stacked_expression_and_have_the_same_loss() -> None:
    model, ours = mixture()
    assert loss(RoutingELBO(0.3), model, hand_written) == pytest.approx(
        loss(RoutingELBO(0.3), model, ours), rel=1e-6
    )


# Units


def test_units_have_routes_and_kls_of_their_own() -> None:
    model = RoutingModel(UnitNetwork(), torch.tensor([PRIOR]))
    guide = RoutingGuide(model, UnitController())
    trace = poutine.trace(guide).get_trace(TOKENS)
    assert trace.nodes["route_0"]["value"].shape == (3, 2, 3, 2)
    assert [f.name for f in trace.nodes["route_0"]["cond_indep_stack"]] == [
        "unit",
        "batch",
        "token",
    ]
    torch.testing.assert_close(
        trace.nodes["route_0"]["fn"].concentration[:, 0, 0], UnitController.concentration
    )
    output = (trace.nodes["route_0"]["value"].mean(0) @ THETA).log()
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(TOKENS, TARGETS)
    torch.testing.assert_close(replayed.nodes["targets"]["fn"].logits, output)
    kl = N * float(
        kl_divergence(
            dist.Dirichlet(UnitController.concentration),
            dist.Dirichlet(torch.tensor(PRIOR).expand(3, 2)),
        ).sum()
    )
    elbo = RoutingELBO(1.0)
    total = loss(elbo, model, guide) * N
    assert elbo.terms is not None and float(elbo.terms.kl) * N == pytest.approx(kl, rel=1e-5)
    assert total == pytest.approx(loss(TraceMeanField_ELBO(), model, guide), rel=1e-5)
    vectorised = RoutingELBO(num_particles=500, vectorize_particles=True)
    apart = loss(RoutingELBO(num_particles=500), model, guide)
    assert loss(vectorised, model, guide) == pytest.approx(apart, abs=0.1)
