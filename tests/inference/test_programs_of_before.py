"""Programs written when the model carried the weight of the KL are served.

They are told where it belongs now.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from bayes_router.inference.elbo import NegativeELBO, RoutingELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from tests.diagnostics.toy import MixtureNetwork
from tests.inference.closed import (
    PRIOR,
    TARGETS,
    TOKENS,
    Q,
    exact_elbo,
    hand_written,
    likelihood,
    mean_under,
    mixture,
)
from tests.tiny import tiny_batch, tiny_concentration, tiny_model

N, W = TOKENS.numel(), 0.2


@pytest.fixture(autouse=True)
def fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def weighted(kl_weight: float = W) -> RoutingModel:
    with pytest.warns(FutureWarning, match=r"RoutingELBO\(kl_weight=...\) or tempered"):
        return RoutingModel(MixtureNetwork(), torch.tensor([PRIOR]), kl_weight=kl_weight)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("guide", ["ours", "hand-written"])
def test_every_guide_has_the_objective_per_token(elbo: type[Trace_ELBO], guide: str) -> None:
    """(nll + w KL) / (B T) in closed form; the guide does not repeat the scale."""
    model = weighted()
    q = mixture()[1] if guide == "ours" else hand_written
    if isinstance(q, RoutingGuide):
        q = RoutingGuide(model, q.controller)
    one, other = dist.Dirichlet(torch.tensor(Q)), dist.Dirichlet(torch.tensor(PRIOR))
    kl = N * float(torch.distributions.kl_divergence(one, other))
    nll = -exact_elbo() - kl
    estimator = elbo(num_particles=4000, vectorize_particles=True)
    found = float(estimator.loss(model, q, TOKENS, TARGETS)) * N
    assert found == pytest.approx(nll + W * kl, abs=0.1)


def test_weighted_by_one_it_is_the_joint_per_token() -> None:
    model, guide = mixture()
    losses = []
    for program, scale in ((model, 1), (weighted(1.0), N)):
        pyro.set_rng_seed(3)
        elbo = RenyiELBO(alpha=1 - 1e-6, num_particles=1)
        losses.append(elbo.loss(program, hand_written, TOKENS, TARGETS) * scale)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_sampler_finds_the_tempered_posterior() -> None:
    kernel = NUTS(weighted(0.25), max_tree_depth=4)
    sampler = MCMC(kernel, num_samples=60, warmup_steps=30, disable_progbar=True)
    sampler.run(torch.zeros(1, 60, dtype=torch.int64), torch.zeros(1, 60, dtype=torch.int64))
    powers = [mean_under(PRIOR, lambda x, p=p: x**p * likelihood(x, 0) ** 4) for p in (0, 1)]
    mean = float(sampler.get_samples()["route_0"][..., 0].mean())
    assert mean == pytest.approx(powers[1] / powers[0], abs=0.04)


def test_an_objective_that_weighs_the_kl_itself_wants_the_same_weight_or_none() -> None:
    model = weighted()
    for elbo in (RoutingELBO(), RoutingELBO(1.0)):
        with pytest.raises(
            ValueError, match="kl_weight of the model: expected .*1.0, or none; got 0.2"
        ):
            elbo.loss(model, hand_written, TOKENS, TARGETS)
    losses = []
    for program in (model, mixture()[0]):
        pyro.set_rng_seed(3)
        losses.append(RoutingELBO(W).loss(program, hand_written, TOKENS, TARGETS))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="kl_weight: expected a positive number; got 0"):
        RoutingModel(MixtureNetwork(), torch.tensor([PRIOR]), kl_weight=0)


def test_the_arguments_in_their_order_of_before() -> None:
    """(network, concentration, cost_ratio, kl_weight, price)."""
    lm, cost = tiny_model(), torch.linspace(1.0, 0.2, 4)
    concentration = tiny_concentration(lm.config)
    with pytest.warns(FutureWarning):
        model = RoutingModel(lm.network, concentration, cost, 1.0, 2.0)
    assert model.price == 2.0 and model.weighted_by == 1.0
    losses = []
    for program in (model, RoutingModel(lm.network, concentration, cost, 2.0)):
        pyro.set_rng_seed(3)
        loss, _ = NegativeELBO(program, RoutingGuide(program, lm.controller))(*tiny_batch())
        losses.append(float(loss))
    assert losses[0] == losses[1]
