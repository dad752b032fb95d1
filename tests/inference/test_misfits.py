"""What does not fit, of model, guide and objective: one ValueError that names both sides."""

import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Importance, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMessenger, AutoNormal
from torch import Tensor

from bayes_router.config import PriorConfig, ScheduleConfig
from bayes_router.diagnostics.measures.amortisation import amortisation_gap
from bayes_router.diagnostics.measures.k_hat import k_hat_frame
from bayes_router.inference.elbo import NegativeELBO, RoutingELBO, tempered
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.matching import check_guide
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.prior import DirichletPrior
from bayes_router.routing.schedule import ScheduleState
from bayes_router.transformer.build import build_prior
from tests.diagnostics.toy import THETA
from tests.inference.closed import (
    PRIOR,
    TARGETS,
    TOKENS,
    LinearNetwork,
    Q,
    UnitController,
    Y,
    blind,
    hand_written,
    mixture,
)
from tests.tiny import tiny_batch, tiny_concentration, tiny_model

N = TOKENS.numel()


@pytest.fixture(autouse=True)
def fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def tiny(**changes: object) -> RoutingModel:
    network = tiny_model()
    return RoutingModel(
        network.network, changes.pop("prior", tiny_concentration(network.config)), **changes
    )  # type: ignore


def by_position(layer: int, shape: torch.Size) -> dist.Dirichlet:
    """A prior of one's own."""
    return dist.Dirichlet(torch.ones(4).expand(*shape, 4))


class Silent:
    """A controller without an answer."""

    def posterior(self, layer: int, hidden: Tensor) -> None:
        return None


class Wrong:
    """A controller over too many experts."""

    def posterior(self, layer: int, hidden: Tensor) -> dist.Dirichlet:
        return dist.Dirichlet(torch.ones(*hidden.shape[:-1], 5))


def lacking(tokens: Tensor, targets: Tensor) -> None:
    """A guide that leaves out layers 1 and 2."""
    with pyro.plate("batch", 2, dim=-2), pyro.plate("token", 40, dim=-1):
        pyro.sample("route_0", dist.Dirichlet(torch.ones(2, 40, 4)))


def several(tokens: Tensor, targets: Tensor) -> None:
    """A guide with a site that the model has not."""
    with pyro.plate("batch", 2, dim=-2), pyro.plate("token", 40, dim=-1):
        for name in ("route_0", "route_1", "route_2", "route_3"):
            pyro.sample(name, dist.Dirichlet(torch.ones(2, 40, 4)))


def shared(tokens: Tensor, targets: Tensor) -> None:
    """A guide with one route for all rows."""
    with pyro.plate("token", 40, dim=-1):
        for name in ("route_0", "route_1", "route_2"):
            pyro.sample(name, dist.Dirichlet(torch.ones(1, 40, 4)))


def observing(tokens: Tensor, targets: Tensor) -> None:
    """A guide that observes: model and guide in the other order."""
    tiny()(tokens, targets)


def step(model: RoutingModel, guide: object = None, targets: Tensor | None = None) -> object:
    tokens, usual = tiny_batch()
    guide = RoutingGuide(model, tiny_model().controller) if guide is None else guide
    return RoutingELBO().differentiable_loss(
        model, guide, tokens, usual if targets is None else targets
    )


def linear() -> RoutingModel:
    return RoutingModel(
        LinearNetwork(), torch.tensor([PRIOR]), likelihood=lambda output: dist.Normal(output, 1.0)
    )


def answering(prior: object) -> RoutingModel:
    """A model whose prior answers this."""
    return tiny(prior=lambda layer, shape: prior)


def k_hats(kl_weight: object) -> object:
    return k_hat_frame(
        *mixture(), [(TOKENS[0], TARGETS[0])], (1,), draws=30, bounds=(1,), kl_weight=kl_weight
    )  # type: ignore[arg-type]


BAD: list[tuple[Callable[[], object], str]] = [
    (
        lambda: step(tiny(), lacking),
        "guide: expected a site for each latent of the model: route_0, route_1, route_2; got 'none "
        "of route_1, route_2'",
    ),
    (
        lambda: step(tiny(), shared),
        r"guide of route_0: expected the shape of the model's site, \(2, 40, 4\); got \(1, 40, 4\)",
    ),
    (
        lambda: step(tiny(), several),
        "guide: expected sites that the model has: route_0, route_1, route_2; got 'route_3'",
    ),
    (
        lambda: step(tiny(prior=lambda layer, shape: dist.Dirichlet(torch.ones(3)))),
        r"prior of route_0: expected the 4 experts of the network; got \(3,\)",
    ),
    (
        lambda: step(tiny(prior=lambda layer, shape: dist.Dirichlet(torch.ones(7, 4)))),
        r"prior of route_0: expected batch shape \(2, 40\)",
    ),
    (
        lambda: tiny(prior=torch.ones(3, 3)),
        "prior: expected the 4 experts of the network; got 3",
    ),
    (
        lambda: tiny(prior=torch.ones(4, 4)),
        "prior: expected the 3 layers of the network; got 4",
    ),
    (
        lambda: tiny().token_prior(3),
        "prior: expected 4 layers or more; got 3",
    ),
    (
        lambda: tiny(price=2.0),
        "price: expected 0 where no cost_ratio was given; got 2.0",
    ),
    (
        lambda: tiny(price=2.0, cost_ratio=torch.ones(3)),
        "cost_ratio: expected the 4 experts of the concentration, or its 3 layers by these "
        r"experts; got \(3,\)",
    ),
    (
        lambda: tiny(prior=by_position, price=2.0),
        "price: expected 0 beside a callable prior",
    ),
    (
        lambda: tiny(prior=by_position).set_prior(torch.ones(3, 4)),
        "prior: expected a DirichletPrior; got 'function'",
    ),
    (
        lambda: step(tiny(likelihood=lambda output: dist.Categorical(logits=output.mean(1)))),
        r"likelihood: expected batch shape \[B, T\] = \(2, 40\) or \[B, 1\]",
    ),
    (
        lambda: step(tiny(), targets=torch.zeros(2, 39, dtype=torch.int64)),
        r"targets: expected the shape of the likelihood, \(2, 40\); got \(2, 39\)",
    ),
    (
        lambda: step(m := tiny(), RoutingGuide(m, Wrong())),
        r"posterior of route_0: expected the 4 experts of the network; got \(5,\)",
    ),
    (
        lambda: step(m := tiny(), RoutingGuide(m, UnitController())),
        r"posterior of route_0: expected batch shape \(2, 40\)",
    ),
    (
        lambda: RoutingELBO().loss(
            m := linear(), RoutingGuide(m, mixture()[1].controller), TOKENS, Y
        ),
        "guide: expected a posterior of the model's latent slope; got 'routes alone'",
    ),
    (
        lambda: NegativeELBO(m := tiny(), RoutingGuide(m, tiny_model().controller), -1.0),
        "kl_weight: expected a positive number; got -1.0",
    ),
    (
        lambda: step(tiny(), observing),
        r"guide: expected nothing observed; got \['targets'\]; the order is \(model, guide\)",
    ),
    (
        lambda: step(tiny(), "AutoNormal"),
        r"guide: expected a program, \(tokens, targets\); got 'str'",
    ),
    (
        lambda: RoutingGuide(tiny(), torch.nn.Linear(1, 1)),  # type: ignore[arg-type]
        r"controller: expected something with posterior\(layer, hidden\); got 'Linear'",
    ),
    (
        lambda: step(m := tiny(), RoutingGuide(m, Silent())),
        "posterior of route_0: expected a distribution; got 'NoneType'",
    ),
    (
        lambda: RoutingGuide(tiny_model(), tiny_model().controller),  # type: ignore[arg-type]
        "model: expected a RoutingModel; got 'RoutedLanguageModel'",
    ),
    (
        lambda: RoutingModel(tiny_model(), tiny_concentration(tiny_model().config)),
        r"network: expected \(tokens, route\) -> output; got 'RoutedLanguageModel'; of a "
        "RoutedLanguageModel pass lm.network",
    ),
    (
        lambda: tiny(prior=DirichletPrior(torch.ones(3, 3))),
        "prior: expected the 4 experts of the network; got 3",
    ),
    (
        lambda: tiny(prior=build_prior(PriorConfig(), tiny_model().config, 3, 40)),
        r"prior: expected a tensor .*; got 'ComputeAwarePrior'; .* pass .concentration",
    ),
    (
        lambda: tiny(prior=dist.Dirichlet(torch.ones(3, 4))),
        r"prior: expected a tensor .* or \(layer, shape\) -> distribution; got 'Dirichlet'",
    ),
    (lambda: step(answering(torch.ones(4))), "prior of route_0: expected a distribution of Pyro"),
    (
        lambda: step(answering(torch.distributions.Dirichlet(torch.ones(4)))),
        "prior of route_0: expected a distribution of Pyro; got 'torch.distributions.dirichlet",
    ),
    (
        lambda: tiny(prior=torch.full((3, 4), math.inf)),
        "concentration: expected positive numbers; got",
    ),
    (
        lambda: tiny(prior=torch.ones(3, 4, dtype=torch.int64)),
        "concentration: expected positive numbers; got",
    ),
    (
        lambda: tiny(price=1.0, cost_ratio=torch.ones(2, 4)),
        r"cost_ratio: expected .* its 3 layers by these experts; got \(2, 4\)",
    ),
    (
        lambda: tiny(price=1.0, cost_ratio=torch.full((4,), math.nan)),
        "cost_ratio: expected finite numbers; got",
    ),
    (
        lambda: tiny(price=1.0, cost_ratio=[1.0, 1.0, 1.0, 1.0]),
        "cost_ratio: expected a tensor; got 'list'",
    ),
    (
        lambda: tiny(price=math.inf, cost_ratio=torch.ones(4)),
        "price: expected 0 or more; got inf",
    ),
    (
        lambda: DirichletPrior(torch.ones(3, 4), price=2.0),
        "price: expected 0 where no cost_ratio was given; got 2.0",
    ),
    (
        lambda: tiny().set_prior(torch.ones(3, 4), 2.0),
        "price: expected 0 where no cost_ratio was given; got 2.0",
    ),
    (lambda: PriorConfig(price=math.inf), "prior.price: expected 0 or more nats .*; got inf"),
    (
        lambda: step(tiny(likelihood=lambda output: output)),
        "likelihood: expected a distribution of Pyro; got 'torch.Tensor'",
    ),
    (
        lambda: step(tiny(), targets=torch.full((2, 40), 23)),
        r"targets: expected ids from 0 to 22; got \(23, 23\)",
    ),
    (
        lambda: step(tiny(), targets=torch.full((2, 40), -5)),
        r"targets: expected ids from 0 to 22; got \(-5, -5\)",
    ),
    (
        lambda: step(tiny(), targets=torch.zeros(2, 40)),
        "targets: expected torch.int64; got torch.float32",
    ),
    (
        lambda: tiny()(torch.zeros(40, dtype=torch.int64)),
        r"tokens: expected shape \[B, T\], one token or more; got \(40,\)",
    ),
    (lambda: RoutingELBO(num_particles=0), "num_particles: expected at least 1; got 0"),
    (lambda: RoutingELBO(math.inf), "kl_weight: expected a positive number; got inf"),
    (lambda: RoutingELBO("0.1"), "kl_weight: expected a positive number; got '0.1'"),  # type: ignore[arg-type]
    (
        lambda: RoutingELBO(torch.ones(2)),  # type: ignore[arg-type]
        r"kl_weight: expected a positive number; got tensor\(\[1., 1.\]\)",
    ),
    (lambda: RoutingELBO().set_kl_weight(0), "kl_weight: expected a positive number; got 0"),
    (
        lambda: NegativeELBO(m := tiny(), RoutingGuide(m, tiny_model().controller)).follow(
            ScheduleState(0.0, torch.ones(3, 4), 0.0, False)
        ),
        "kl_weight: expected a positive number; got 0.0",
    ),
    (lambda: tempered(tiny(), math.nan), "kl_weight: expected a positive number; got nan"),
    (lambda: tempered(tiny(), 0.0), "kl_weight: expected a positive number; got 0.0"),
    (lambda: k_hats(0.0), "kl_weight: expected a positive number; got 0.0"),
    (
        lambda: amortisation_gap(*mixture(), TOKENS, TARGETS, kl_weight=math.inf),
        "kl_weight: expected a positive number; got inf",
    ),
    (
        lambda: ScheduleConfig(kl_weight=math.inf),
        "schedule.kl_weight: expected a positive number; got inf",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_does_not_fit_is_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        make()


# A guide that does not fit, in estimators that are Pyro's own


class Inside(AutoMessenger):
    """A guide that runs inside the model."""

    def get_posterior(self, name: str, prior: object) -> dist.Dirichlet:
        return dist.Dirichlet(torch.tensor(Q))


NAMED = {
    lacking: "each latent of the model: route_0, route_1, route_2; got 'none of route_1, route_2'",
    several: "sites that the model has: route_0, route_1, route_2; got 'route_3'",
    shared: r"the shape of the model's site, \(2, 40, 4\); got \(1, 40, 4\)",
    observing: "nothing observed; got",
}


@pytest.mark.parametrize("guide", NAMED, ids=lambda guide: guide.__name__)
def test_check_guide_answers_for_any_program_and_estimator(guide: Callable[..., None]) -> None:
    for program in (tiny(), tempered(tiny(), 0.3)):
        with pytest.raises(ValueError, match="^guide.*: expected .*" + NAMED[guide]):
            check_guide(program, guide, *tiny_batch())


@pytest.mark.parametrize("kind", ["ours", "hand-written", "AutoNormal", "inside"])
def test_a_guide_that_fits_passes_and_the_draws_that_follow_are_as_without_the_check(
    kind: str,
) -> None:
    losses = []
    for checked in (True, False):
        pyro.clear_param_store()
        model, ours = mixture()
        guides = {"ours": lambda g=ours: g, "hand-written": lambda: hand_written}
        guides |= {"AutoNormal": lambda m=model: AutoNormal(m), "inside": lambda m=model: Inside(m)}
        guide = guides[kind]()
        if kind == "AutoNormal":
            guide(TOKENS, TARGETS)  # its first call makes it
        pyro.set_rng_seed(3)
        if checked:
            check_guide(model, guide, TOKENS, targets=TARGETS)
        losses.append(RoutingELBO().loss(model, guide, TOKENS, TARGETS))
    assert losses[0] == losses[1]


def nothing(tokens: Tensor, targets: Tensor) -> None:
    """A guide without any site."""


def test_what_pyros_own_estimators_do_with_a_guide_without_a_site() -> None:
    """Here the posterior is the prior: the loss would be -log p(y), and every weight p(y).

    The route is drawn from the prior, and its density there is counted against none: the loss is
    off by the prior's entropy, the weights scatter.
    """
    model, _ = blind()
    evidence = float(THETA[0, TARGETS].log().sum())
    entropy = N * float(dist.Dirichlet(torch.tensor(PRIOR)).entropy())
    with pytest.warns(UserWarning, match="Found vars in model but not guide: {'route_0'}"):
        loss = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=2).loss(
            model, nothing, TOKENS, TARGETS
        )
    assert abs(entropy) > 0.4 and float(loss) == pytest.approx(-evidence + entropy, abs=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in silence
        weighed = Importance(model, nothing, num_samples=50).run(TOKENS, TARGETS)
    assert float(weighed.get_ESS()) < 45
    with (
        pytest.warns(UserWarning, match="Found vars in model but not guide"),
        pytest.raises(KeyError, match="route_0"),
    ):
        TraceMeanField_ELBO().loss(model, nothing, TOKENS, TARGETS)
    for program in (model, tempered(model, 0.5)):
        with pytest.raises(ValueError, match="latent of the model: route_0; got 'none of route_0'"):
            check_guide(program, nothing, TOKENS, TARGETS)


def test_checks_of_a_step_print_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printing waits for the device, and ends the capture of a step as a CUDA graph."""
    network = tiny_model()
    model = RoutingModel(network.network, tiny_concentration(network.config))
    guide = RoutingGuide(model, network.controller)
    tokens, targets = tiny_batch()

    def printed(x: Tensor, *_: object, **__: object) -> str:
        raise AssertionError("a tensor is printed")

    monkeypatch.setattr(Tensor, "__repr__", printed)
    monkeypatch.setattr(Tensor, "__format__", printed)
    loss = RoutingELBO()(model, guide)(tokens, targets)
    loss.backward()
    assert all(x.grad is not None for x in network.controller.parameters())
