"""Every idiom of Pyro on the program, each with a number known in closed form.

docs/pyro.md lists them.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    HMC,
    MCMC,
    NUTS,
    SVI,
    Importance,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    WeighedPredictive,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from bayes_router.inference.elbo import RoutingELBO, tempered
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.tilt import tilted_moments
from tests.diagnostics.toy import THETA, MixtureNetwork, exact_posterior_mean, toy
from tests.inference.closed import (
    PRIOR,
    TARGETS,
    TOKENS,
    LinearNetwork,
    Q,
    X,
    Y,
    blind,
    exact_elbo,
    exact_evidence,
    hand_written,
    likelihood,
    mean_under,
    mixture,
    slope_evidence,
    slope_posterior,
)
from tests.tiny import tiny_batch, tiny_concentration, tiny_model

N = TOKENS.numel()


@pytest.fixture(autouse=True)
def fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


# Estimators


@pytest.mark.parametrize("guide", ["ours", "hand-written"])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, RoutingELBO])
@pytest.mark.parametrize("vectorised", [True, False])
def test_each_estimator_of_the_elbo_has_the_exact_mean(
    elbo: type[Trace_ELBO], guide: str, vectorised: bool
) -> None:
    model, ours = mixture()
    particles, width = (4000, 0.1) if vectorised else (40, 1.0)
    estimator = elbo(num_particles=particles, vectorize_particles=vectorised)
    loss = float(estimator.loss(model, ours if guide == "ours" else hand_written, TOKENS, TARGETS))
    assert loss == pytest.approx(-exact_elbo(), abs=width)


def test_renyi_with_many_particles_is_the_evidence() -> None:
    """alpha = 0 is the importance-weighted bound."""
    pair = toy(MixtureNetwork(), torch.tensor([PRIOR]), torch.tensor([PRIOR]))
    loss = RenyiELBO(alpha=0, num_particles=20_000, vectorize_particles=True).loss(
        *pair, TOKENS, TARGETS
    )
    assert float(loss) == pytest.approx(-exact_evidence(), abs=0.1)


@pytest.mark.parametrize("elbo", [JitTrace_ELBO, JitTraceMeanField_ELBO])
def test_jit_is_refused_by_name(elbo: type[Trace_ELBO]) -> None:
    svi = SVI(*mixture(), pyro.optim.Adam({"lr": 1e-3}), elbo(ignore_jit_warnings=True))
    with pytest.raises(
        ValueError, match="estimator: expected one that does not trace by torch.jit"
    ):
        svi.step(TOKENS, TARGETS)


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_an_enumerated_route_is_no_idiom_of_this_program() -> None:
    """Routes are continuous.

    There is nothing to enumerate, and what is asked for is the ELBO as it was.
    """
    model, guide = mixture()
    many = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 2}
    for elbo, program in (
        (Trace_ELBO(**many), config_enumerate(model)),
        (TraceEnum_ELBO(**many), model),
        (TraceEnum_ELBO(**many), config_enumerate(model, default="parallel")),
    ):
        loss = elbo.loss(program, guide, TOKENS, TARGETS)
        assert float(loss) == pytest.approx(-exact_elbo(), abs=0.15)


def test_tempering_is_the_weighted_objective_for_any_guide() -> None:
    """w x the loss of the tempered program = nll + w KL, in closed form."""
    model, ours = mixture()
    kl = N * float(
        torch.distributions.kl_divergence(
            dist.Dirichlet(torch.tensor(Q)), dist.Dirichlet(torch.tensor(PRIOR))
        )
    )
    nll = -exact_elbo() - kl
    for guide in (ours, hand_written):
        for elbo in (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO):
            made = elbo(num_particles=4000, vectorize_particles=True)
            assert 0.2 * made.loss(tempered(model, 0.2), guide, TOKENS, TARGETS) == pytest.approx(
                nll + 0.2 * kl, abs=0.1
            )
        weighted = RoutingELBO(0.2, num_particles=4000, vectorize_particles=True)
        assert weighted.loss(model, guide, TOKENS, TARGETS) * N == pytest.approx(
            nll + 0.2 * kl, abs=0.1
        )
        assert weighted.terms is not None and float(weighted.terms.kl) * N == pytest.approx(
            kl, rel=1e-4
        )


def test_terms_are_the_mean_over_particles() -> None:
    model, guide = mixture()
    elbo = RoutingELBO(1.0, num_particles=3)
    torch.manual_seed(5)
    loss = elbo.differentiable_loss(model, guide, TOKENS, TARGETS)
    torch.manual_seed(5)
    single = [RoutingELBO(1.0) for _ in range(3)]
    losses = [float(one.differentiable_loss(model, guide, TOKENS, TARGETS)) for one in single]
    assert elbo.terms is not None and float(loss) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert float(elbo.terms.nll) == pytest.approx(
        sum(float(one.terms.nll) for one in single) / 3, rel=1e-5
    )  # type: ignore


# Importance


def test_importance_weights_are_right() -> None:
    """A posterior that is the prior.

    With the prior as guide all weights are the evidence, with another they scatter.
    """
    model, guide = blind()
    for proposal in (guide, None):
        posterior = Importance(model, proposal, num_samples=20).run(TOKENS, TARGETS)
        evidence = float(THETA[0, TARGETS].log().sum())
        weights = torch.stack([torch.as_tensor(w) for w in posterior.log_weights])
        torch.testing.assert_close(weights, torch.full((20,), evidence), rtol=1e-4, atol=1e-4)
        assert float(posterior.get_ESS()) == pytest.approx(20, rel=1e-3)
    wide = Importance(*blind((6.0, 0.7)), num_samples=50).run(TOKENS, TARGETS)
    assert float(wide.get_ESS()) < 15


def test_importance_estimates_the_evidence_also_of_the_cold_posterior() -> None:
    model, guide = toy(MixtureNetwork(), torch.tensor([PRIOR]), torch.tensor([PRIOR]))
    for program, exact in ((model, exact_evidence()), (tempered(model, 0.5), exact_evidence(2.0))):
        weights, _, _ = vectorized_importance_weights(
            program, guide, TOKENS, TARGETS, num_samples=20_000, max_plate_nesting=2
        )
        found = float(weights.logsumexp(0) - torch.tensor(20_000.0).log())
        assert found == pytest.approx(exact, abs=0.05)


def test_psis_tells_a_narrow_guide_from_the_posterior() -> None:
    """One token: k of Dirichlet(q) for Dirichlet(p) is max(1 - p / q).

    Here 1 - 1.0 / 4.0 = 0.75.
    """
    model, same = blind((1.05, 1.45))
    one, target = TOKENS[:1, :1], TARGETS[:1, :1]
    assert psis_diagnostic(model, same, one, target, num_particles=5000, max_plate_nesting=2) < 0.4
    model, narrow = blind((4.0, 1.5))
    k = psis_diagnostic(model, narrow, one, target, num_particles=20_000, max_plate_nesting=2)
    assert k == pytest.approx(0.75, abs=0.2)


# Prediction


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_draws_of_the_guide(parallel: bool) -> None:
    model, guide = mixture()
    draws = Predictive(
        model, guide=guide, num_samples=2000 if parallel else 300, parallel=parallel
    )(TOKENS)
    assert set(draws) == {"route_0", "targets"} and draws["route_0"].shape[1:] == (2, 3, 2)
    torch.testing.assert_close(
        draws["route_0"].mean((0, 1, 2)), torch.tensor(Q) / sum(Q), rtol=0, atol=0.02
    )
    share = torch.bincount(draws["targets"].flatten(), minlength=3) / draws["targets"].numel()
    torch.testing.assert_close(share, torch.tensor(Q) / sum(Q) @ THETA, rtol=0, atol=0.03)


def test_parallel_prediction_of_a_deep_network_is_that_of_each_draw_alone() -> None:
    network = tiny_model()
    model = RoutingModel(network.network, tiny_concentration(network.config))
    guide = RoutingGuide(model, network.controller)
    tokens, targets = tiny_batch(T=12)
    draws = Predictive(
        model,
        guide=guide,
        num_samples=3,
        parallel=True,
        return_sites=("route_0", "route_1", "route_2"),
    )(tokens)
    with pyro.plate("draws", 3, dim=-3), torch.no_grad():
        batch = poutine.trace(poutine.condition(model, draws)).get_trace(tokens, targets)
    batch.compute_log_prob()
    for i in range(3):
        one = poutine.trace(
            poutine.condition(model, {name: value[i] for name, value in draws.items()})
        )
        with torch.no_grad():
            single = one.get_trace(tokens, targets)
        single.compute_log_prob()
        for site in ("targets", "route_1"):
            torch.testing.assert_close(
                batch.nodes[site]["log_prob"][i],
                single.nodes[site]["log_prob"],
                rtol=1e-4,
                atol=1e-4,
            )


def test_vectorised_particles_of_a_deep_network_are_the_single_ones() -> None:
    """The guide reads hidden states, of every particle its own."""
    network = tiny_model()
    model = RoutingModel(network.network, tiny_concentration(network.config))
    guide = RoutingGuide(model, network.controller)
    tokens, targets = tiny_batch(T=12)
    losses = []
    for vectorised in (True, False):
        elbo = RoutingELBO(num_particles=40, vectorize_particles=vectorised, max_plate_nesting=2)
        losses.append((elbo.loss(model, guide, tokens, targets), elbo.terms))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.03)
    assert float(losses[0][1].kl) == pytest.approx(float(losses[1][1].kl), rel=0.03)  # type: ignore[union-attr]


def test_weighed_predictive_has_the_log_weights() -> None:
    model, guide = blind((2.0, 1.5))
    scored = pyro.condition(model, {"targets": TARGETS})
    found = WeighedPredictive(model, guide=guide, num_samples=4000, parallel=True)(
        TOKENS, model_guide=scored
    )
    q, p = dist.Dirichlet(torch.tensor((2.0, 1.5))), dist.Dirichlet(torch.tensor(PRIOR))
    routes = found.samples["route_0"]
    exact = (p.log_prob(routes) - q.log_prob(routes)).sum((-1, -2)) + THETA[0, TARGETS].log().sum()
    torch.testing.assert_close(found.log_weights, exact, rtol=1e-3, atol=1e-3)


# Handlers


def test_condition_replay_do_block_and_mask() -> None:
    model, guide = mixture()
    route = torch.tensor([0.3, 0.7]).expand(2, 3, 2)
    log_likelihood = float((route @ THETA).gather(-1, TARGETS[..., None]).log().sum())
    log_prior = float(dist.Dirichlet(torch.tensor(PRIOR)).log_prob(route).sum())
    known = {"route_0": route}

    def total(program: object) -> float:
        return float(poutine.trace(program).get_trace(TOKENS, TARGETS).log_prob_sum())

    assert total(poutine.condition(model, known)) == pytest.approx(
        log_prior + log_likelihood, rel=1e-5
    )
    done = poutine.trace(poutine.do(model, known)).get_trace(TOKENS, TARGETS)
    done.compute_log_prob()
    assert float(done.nodes["targets"]["log_prob_sum"]) == pytest.approx(log_likelihood, rel=1e-5)
    drawn = poutine.trace(guide).get_trace(TOKENS)
    replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(TOKENS, TARGETS)
    assert replayed.nodes["route_0"]["value"] is drawn.nodes["route_0"]["value"]
    hidden = poutine.trace(
        poutine.block(poutine.condition(model, known), hide=["route_0"])
    ).get_trace(TOKENS, TARGETS)
    assert "route_0" not in hidden.nodes and float(hidden.log_prob_sum()) == pytest.approx(
        log_likelihood, rel=1e-5
    )
    assert total(poutine.mask(poutine.condition(model, known), mask=False)) == 0.0
    assert total(poutine.scale(poutine.condition(model, known), 3.0)) == pytest.approx(
        3 * (log_prior + log_likelihood), rel=1e-5
    )


def test_a_conditioned_or_changed_model_is_not_answered_from_the_pass_of_the_guide() -> None:
    """The guide leaves its output for the model.

    Other routes, other weights or another text have to be computed anew.
    """
    network = tiny_model()
    model = RoutingModel(network.network, tiny_concentration(network.config))
    guide = RoutingGuide(model, network.controller)
    tokens, targets = tiny_batch(T=12)

    def density(program: object, after: object = None) -> float:
        torch.manual_seed(0)
        drawn = poutine.trace(guide).get_trace(tokens)
        if callable(after):
            after()
        trace = poutine.trace(poutine.replay(program, trace=drawn)).get_trace(tokens, targets)
        return float(trace.nodes["targets"]["fn"].log_prob(targets).sum())

    usual = density(model)
    fixed = torch.full((2, 12, 4), 0.25)
    changed = density(poutine.condition(model, {"route_1": fixed}))
    assert changed != usual
    passes: list[int] = []
    handle = network.network.register_forward_hook(lambda *_: passes.append(1))
    assert density(model) == usual and len(passes) == 1
    moved = density(model, lambda: torch.nn.init.zeros_(network.network.norm.weight))
    assert len(passes) == 3 and moved != usual
    handle.remove()


# Samplers


@pytest.mark.parametrize("kernel", [NUTS, HMC])
def test_samplers_find_the_posterior_and_of_an_unscored_token_the_prior(kernel: type) -> None:
    model, _ = mixture()
    settings = {"max_tree_depth": 4} if kernel is NUTS else {"step_size": 0.3, "num_steps": 6}
    sampler = MCMC(kernel(model, **settings), num_samples=80, warmup_steps=30, disable_progbar=True)
    tokens, targets = (
        torch.zeros(3, 40, dtype=torch.int64),
        torch.tensor([0, 2, -100])[:, None].expand(3, 40),
    )
    sampler.run(tokens, targets)  # a row of tokens of one posterior: their mean is sure
    exact = exact_posterior_mean(torch.tensor(PRIOR), torch.tensor([0, 2, 0]))
    exact[2] = torch.tensor(PRIOR) / sum(PRIOR)
    torch.testing.assert_close(
        sampler.get_samples()["route_0"].mean((0, 2)), exact, rtol=0, atol=0.04
    )


def test_the_sampler_of_the_tempered_program_finds_the_cold_posterior() -> None:
    model, _ = mixture()
    kernel = NUTS(tempered(model, 0.25), max_tree_depth=4)
    sampler = MCMC(kernel, num_samples=60, warmup_steps=30, disable_progbar=True)
    sampler.run(torch.zeros(1, 60, dtype=torch.int64), torch.zeros(1, 60, dtype=torch.int64))
    powers = [mean_under(PRIOR, lambda x, p=p: x**p * likelihood(x, 0) ** 4) for p in (0, 1)]
    assert float(sampler.get_samples()["route_0"][..., 0].mean()) == pytest.approx(
        powers[1] / powers[0], abs=0.04
    )


@pytest.mark.slow  # two processes that import torch
def test_several_chains() -> None:
    model, _ = mixture()
    sampler = MCMC(
        NUTS(model, max_tree_depth=4),
        num_samples=60,
        warmup_steps=30,
        num_chains=2,
        disable_progbar=True,
    )
    sampler.run(torch.zeros(1, 40, dtype=torch.int64), torch.zeros(1, 40, dtype=torch.int64))
    by_chain = sampler.get_samples(group_by_chain=True)["route_0"]
    assert by_chain.shape == (2, 60, 1, 40, 2)
    exact = exact_posterior_mean(torch.tensor(PRIOR), torch.tensor(0))
    for chain in by_chain:
        torch.testing.assert_close(chain.mean((0, 1, 2)), exact, rtol=0, atol=0.05)


# Weights that are random, and autoguides over them


def linear() -> RoutingModel:
    prior = torch.tensor([PRIOR], dtype=torch.float64)
    return RoutingModel(LinearNetwork(), prior, likelihood=lambda output: dist.Normal(output, 1.0))


def ours(model: RoutingModel, rest: object) -> RoutingGuide:
    return RoutingGuide(
        model,
        toy(MixtureNetwork(), torch.tensor([PRIOR]), torch.tensor([PRIOR]))[1].controller,
        rest,
    )  # type: ignore


def weights_alone(model: RoutingModel) -> object:
    return poutine.block(model, hide=["route_0", "targets"])


@pytest.mark.parametrize("listed", [False, True])
def test_autonormal_over_a_weight_at_the_exact_posterior_has_the_evidence(listed: bool) -> None:
    """log p(y, w) - log q(w) is the same for every draw where q is the posterior."""
    model = linear()
    rest = AutoNormal(weights_alone(model))
    if listed:
        one, rest = rest, AutoGuideList(weights_alone(model))
        rest.append(one)
    rest(TOKENS, Y)
    mean, sd = slope_posterior()
    normal = rest[0] if listed else rest
    with torch.no_grad():
        normal.locs.slope.fill_(mean)
    normal.scales.slope = torch.tensor(sd, dtype=torch.float64)
    guide = ours(model, rest)
    assert float(Trace_ELBO().loss(model, guide, TOKENS, Y)) == pytest.approx(
        -slope_evidence(), abs=0.02
    )
    losses = []
    for elbo, scale in ((TraceMeanField_ELBO(), 1), (RoutingELBO(1.0), N), (RoutingELBO(), 1)):
        pyro.set_rng_seed(3)
        losses.append(float(elbo.loss(model, guide, TOKENS, Y)) * scale)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_autodelta_over_a_weight_finds_its_mode() -> None:
    model = linear()
    rest = AutoDelta(weights_alone(model))
    guide = ours(model, rest)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), RoutingELBO())
    for _ in range(60):
        svi.step(TOKENS, Y)
    assert float(rest.median()["slope"]) == pytest.approx(slope_posterior()[0], abs=0.02)


def test_a_weight_is_drawn_once_a_pass_outside_of_the_plates() -> None:
    trace = poutine.trace(linear()).get_trace(TOKENS, Y)
    site = trace.nodes["slope"]
    assert site["value"].shape == () and not site["cond_indep_stack"]
    slope, route = site["value"], trace.nodes["route_0"]["value"]
    joint = dist.Normal(slope * X, 1.0).log_prob(Y).sum() + dist.Normal(0.0, 1.0).log_prob(slope)
    joint = joint + dist.Dirichlet(torch.tensor(PRIOR)).log_prob(route).sum()
    assert float(trace.log_prob_sum()) == pytest.approx(float(joint), rel=1e-6)
    model = linear()
    with pytest.raises(ValueError, match="particles: expected one after another"):
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
        elbo.loss(model, ours(model, AutoNormal(weights_alone(model))), TOKENS, Y)


class Heated(PyroModule):
    """Hidden states are a random weight."""

    def __init__(self) -> None:
        super().__init__()
        self.heat = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, tokens: Tensor, route: object) -> Tensor:
        heat = self.heat
        route(0, heat.expand(*tokens.shape, 1))  # type: ignore[operator]
        return heat.expand(tokens.shape)


def test_the_posterior_of_a_route_reads_the_weights_that_were_drawn() -> None:
    class Reader:
        def posterior(self, layer: int, hidden: Tensor) -> dist.Dirichlet:
            return dist.Dirichlet(torch.cat([hidden.exp(), torch.ones_like(hidden)], -1))

    prior = torch.tensor([PRIOR])
    model = RoutingModel(Heated(), prior, likelihood=lambda output: dist.Normal(output, 1.0))
    rest = AutoNormal(weights_alone(model))
    trace = poutine.trace(RoutingGuide(model, Reader(), rest)).get_trace(TOKENS, Y.float())
    heat = trace.nodes["heat"]["value"]
    concentration = trace.nodes["route_0"]["fn"].concentration[..., 0]
    torch.testing.assert_close(concentration, heat.exp().expand(2, 3))


def test_an_autoguide_over_the_routes_is_fitted_to_the_evidence() -> None:
    """Of the text's own routes: no controller. The bound lies below the evidence and near it."""
    model, _ = mixture()
    guide = AutoNormal(model)
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        Trace_ELBO(num_particles=16, vectorize_particles=True),
    )
    for _ in range(150):
        svi.step(TOKENS, TARGETS)
    bound = -Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(
        model, guide, TOKENS, TARGETS
    )
    assert exact_evidence() - 0.5 < bound < exact_evidence() + 0.05


# Numbers


def by_hand(
    model: RoutingModel, guide: RoutingGuide, tilt: Tensor, tokens: Tensor, targets: Tensor
) -> float:
    """The loss of one draw in float64, nats of the batch; each KL and log Z written out."""
    total = torch.zeros((), dtype=torch.float64)
    pyro.set_rng_seed(1)

    def route(layer: int, hidden: Tensor) -> Tensor:
        nonlocal total
        q = guide.controller.posterior(layer, hidden)
        p = dist.Dirichlet(model.concentration[layer].double())
        log_z = tilted_moments(p.concentration, tilt).log_normaliser
        kl = torch.distributions.kl_divergence(q, p) + q.mean @ tilt.double() + log_z
        total = total + kl.double().sum()
        return dist.Dirichlet(q.concentration).rsample()

    logits = model.network(tokens, route)
    nll = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).sum()
    return float((total + nll).detach())


@pytest.mark.parametrize("price", [0.0, 2.0])
def test_float64_by_default_or_of_the_model(price: float) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        network = tiny_model().double()
        cost = torch.linspace(1.0, 0.2, 4)
        model = RoutingModel(network.network, tiny_concentration(network.config), cost, price)
        guide = RoutingGuide(model, network.controller)
        tokens, targets = tiny_batch(T=8)
        exact = by_hand(model, guide, price * cost, tokens, targets)
        for elbo, scale in ((RoutingELBO(1.0), tokens.numel()), (TraceMeanField_ELBO(), 1)):
            pyro.set_rng_seed(1)
            loss = elbo.differentiable_loss(model, guide, tokens, targets)
            assert loss.dtype == torch.float64
            assert float(loss) * scale == pytest.approx(exact, rel=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_scores_of_prior_draws_are_finite_under_a_price() -> None:
    network = tiny_model()
    model = RoutingModel(
        network.network, tiny_concentration(network.config), torch.linspace(1.0, 0.2, 4), 10.0
    )
    tokens, targets = tiny_batch()
    values: list[Tensor] = Importance(model, num_samples=5).run(tokens, targets).log_weights
    assert all(bool(torch.isfinite(torch.as_tensor(value))) for value in values)
