"""What one controller for all tokens costs against concentrations fitted to each sequence.

And the guide against NUTS.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import positive, require
from bayes_router.diagnostics.measures.bootstrap import Estimate, clustered
from bayes_router.diagnostics.measures.collapse import kl_to_prior
from bayes_router.diagnostics.measures.k_hat import FitThresholds
from bayes_router.diagnostics.measures.verdict import Severity, Verdict
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel, harden
from bayes_router.inference.sites import of_site, route_site, to_network, with_unit
from bayes_router.routing.controller import MetaController
from bayes_router.routing.posterior import inverse_softplus, posterior, posterior_mean
from bayes_router.transformer.nll import token_nll
from bayes_router.types import Route

DRAWS = 16
STEPS = 60
LEARNING_RATE = 0.1


class AmortisationGap(NamedTuple):
    """Of held-out sequences; nats per token.

    A bound is -(nll + kl_weight x KL): the ELBO where kl_weight is 1.
    """

    kl_weight: float
    standard_error: float  # of the gap, over the draws
    bound_controller: float
    bound_own: float  # concentrations fitted to each sequence, targets seen
    nll_controller: float
    nll_own: float
    kl_controller: float
    kl_own: float
    interval: Estimate | None = None  # of the gap, over windows; None: there is one window

    @property
    def gap(self) -> float:
        """What the sequence's own concentrations gain."""
        return self.bound_own - self.bound_controller


def amortisation_gap(
    program: RoutingModel,
    guide: RoutingGuide,
    tokens: Tensor,
    targets: Tensor,
    *,
    kl_weight: float = 1.0,
    steps: int = STEPS,
    lr: float = LEARNING_RATE,
    draws: int = DRAWS,
    seed: int = 0,
) -> AmortisationGap:
    """Fit the concentrations of these sequences by themselves, and compare the ELBOs.

    The fit starts from the controller's.

    The own fit sees the targets, the controller does not: the gap holds what amortisation loses and
    also what hindsight gains. It starts from the controller's concentrations along the MEAN path
    and moves log(expm1(concentration - floor)).

    Args:
        program: the generative program.
        guide: holds the controller.
        tokens: int64 [B, T].
        targets: int64 [B, T]; -100 is not scored.
        kl_weight: of the KL in both bounds; 1 is the ELBO.
        steps: of Adam.
        lr: of Adam.
        draws: on which both bounds are read, the same random numbers for both.
        seed: of the draws; the caller's generator is left as it was.
    """
    positive("kl_weight", kl_weight)
    concentrations = _mean_path(program, guide, tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = _fit(program, _floor(guide), concentrations, tokens, targets, kl_weight, steps, lr)
        before = _bound(program, _controlled(guide), tokens, targets, draws, seed + 1)
        after = _bound(program, lambda layer, hidden: own[layer], tokens, targets, draws, seed + 1)
    controller, fitted = (-(nll + kl_weight * kl) for nll, kl in (before, after))
    gained = fitted - controller  # [S, B]
    error = float(gained.mean(1).std() / draws**0.5) if draws > 1 else float("nan")
    of_window = gained.mean(0).numpy()
    windows = range(len(of_window))
    interval = (
        clustered(lambda index: of_window[index].mean(), windows) if len(windows) > 1 else None
    )
    (nll, kl), (own_nll, own_kl) = before, after
    return AmortisationGap(
        kl_weight=kl_weight,
        standard_error=error,
        bound_controller=float(controller.mean()),
        bound_own=float(fitted.mean()),
        nll_controller=float(nll.mean()),
        nll_own=float(own_nll.mean()),
        kl_controller=float(kl.mean()),
        kl_own=float(own_kl.mean()),
        interval=interval,
    )


def _floor(guide: RoutingGuide) -> float:
    """The least concentration that the controller answers with."""
    controller = guide.controller
    require(
        isinstance(controller, MetaController),
        "guide",
        "a MetaController inside",
        type(controller).__name__,
    )
    assert isinstance(controller, MetaController)
    return controller.floor


def _controlled(guide: RoutingGuide) -> Route:

    def route(layer: int, hidden: Tensor) -> Tensor:
        return with_unit(
            guide.controller.posterior(layer, hidden).concentration, guide.model.num_units
        )

    return route


def _executed(program: RoutingModel, route: Tensor) -> Tensor:
    """What the network gets of weights [B, T, R, E]."""
    return to_network(harden(route) if program.straight_through else route, program.num_units)


@torch.no_grad()
def _mean_path(program: RoutingModel, guide: RoutingGuide, tokens: Tensor) -> list[Tensor]:
    """The controller's concentrations [B, T, R, E] of each layer.

    The layers below execute their means.
    """
    found: list[Tensor] = []

    def route(layer: int, hidden: Tensor) -> Tensor:
        found.append(
            with_unit(guide.controller.posterior(layer, hidden).concentration, program.num_units)
        )
        return to_network(posterior_mean(found[-1]), program.num_units)

    program.network(tokens, route)
    return found


def _fit(
    program: RoutingModel,
    floor: float,
    start: list[Tensor],
    tokens: Tensor,
    targets: Tensor,
    kl_weight: float,
    steps: int,
    lr: float,
) -> list[Tensor]:
    """Concentrations that raise the bound of these sequences."""
    raw = [inverse_softplus((c - floor).clamp_min(1e-6)).requires_grad_() for c in start]
    optimiser = torch.optim.Adam(raw, lr=lr)
    for _ in range(steps):
        q = [posterior(r, floor) for r in raw]

        def route(layer: int, hidden: Tensor, q: list[Dirichlet] = q) -> Tensor:
            return _executed(program, q[layer].rsample())

        kl = torch.stack(
            [
                kl_to_prior(program, layer, d.concentration).sum(-1).mean()
                for layer, d in enumerate(q)
            ]
        ).sum()
        loss = token_nll(program.network(tokens, route), targets).mean() + kl_weight * kl
        for parameter, gradient in zip(raw, torch.autograd.grad(loss, raw), strict=True):
            parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        optimiser.step()
    return [posterior(r.detach(), floor).concentration for r in raw]


@torch.no_grad()
def _bound(
    program: RoutingModel,
    concentration: Route,
    tokens: Tensor,
    targets: Tensor,
    draws: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Nll and KL per token of each draw and window, [S, B]."""
    nlls, kls = [], []
    for draw in range(draws):
        torch.manual_seed(seed + draw)
        kl: list[Tensor] = []

        def route(layer: int, hidden: Tensor, kl: list[Tensor] = kl) -> Tensor:
            c = concentration(layer, hidden)
            assert isinstance(c, Tensor)
            kl.append(kl_to_prior(program, layer, c).sum(-1).mean(-1).cpu())  # over units, tokens
            return _executed(program, Dirichlet(c, validate_args=False).sample())

        nlls.append(token_nll(program.network(tokens, route), targets).mean(-1).double().cpu())
        kls.append(torch.stack(kl).sum(0))
    return torch.stack(nlls), torch.stack(kls)


def gap_verdict(gap: AmortisationGap, thresholds: FitThresholds | None = None) -> Verdict:
    """What the gap means."""
    t = thresholds or FitThresholds()
    reached = gap.gap if gap.interval is None else gap.interval.high
    good, literal = reached <= t.gap, gap.kl_weight == 1
    bound = "the ELBO" if literal else f"the objective of training (KL weight {gap.kl_weight:g})"
    gained = f"{gap.gap:.3f}, of one window," if gap.interval is None else str(gap.interval)
    from_nll, from_kl = (
        gap.nll_controller - gap.nll_own,
        gap.kl_weight * (gap.kl_controller - gap.kl_own),
    )
    advice = (
        "a schedule.kl_weight nearer 1, if the ELBO is what counts: the guide was fitted to "
        "another weight."
        if literal and from_kl > from_nll
        else (
            "a wider controller (model.controller_hidden) or longer training; what hindsight "
            "gains cannot be had."
        )
    )
    return Verdict(
        "amortisation",
        Severity.GOOD if good else Severity.NOTE,
        f"concentrations fitted to each sequence, its targets seen, gain {gained} nats per token "
        f"of {bound} over the controller's: {from_nll:+.3f} by the nll, {from_kl:+.3f} by the KL "
        f"(threshold {t.gap:g}, for all of the interval; +- {gap.standard_error:.3f} by the "
        "draws).",
        "" if good else advice,
    )


def nuts_comparison(
    program: RoutingModel,
    guide: RoutingGuide,
    tokens: Tensor,
    targets: Tensor,
    *,
    draws: int = 500,
    warmup: int = 300,
    guide_draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Posterior means of every route by NUTS and by the guide.

    On a model small enough for sampling.

    NUTS samples the program as it is, the exact joint; wrap it by `tempered` for what a KL weight
    pursues.

    Returns:
        One row a layer, sequence, token, unit and expert: `guide`, `nuts` (posterior means), their
            `difference`, and `prior`.
    """
    require(guide_draws >= 1 and draws >= 1, "draws", "at least 1", (draws, guide_draws))
    with torch.random.fork_rng(devices=[]), pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(seed)
        sampler = MCMC(NUTS(program), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
        sampler.run(tokens, targets)
        samples = sampler.get_samples()
        layers = range(len(program.concentration))
        sampled = torch.stack(
            [of_site(samples[route_site(layer)].mean(0), program.num_units) for layer in layers]
        )
        guided = torch.zeros_like(sampled)
        with torch.no_grad():
            for _ in range(guide_draws):
                guided += _posterior_means(program, guide, tokens) / guide_draws
    index = np.indices(sampled.shape).reshape(5, -1)
    frame = pd.DataFrame(
        dict(zip(("layer", "sequence", "token", "unit", "expert"), index, strict=True))
    )
    prior = posterior_mean(program.concentration)
    prior = (prior if prior.dim() == 3 else prior[:, None])[:, None, None].expand_as(sampled)
    frame["guide"], frame["nuts"], frame["prior"] = (
        x.detach().flatten().numpy() for x in (guided, sampled, prior)
    )
    frame["difference"] = frame["guide"] - frame["nuts"]
    return frame


def _posterior_means(program: RoutingModel, guide: RoutingGuide, tokens: Tensor) -> Tensor:
    """[L, B, T, R, E], along one path of draws."""
    means: list[Tensor] = []

    def route(layer: int, hidden: Tensor) -> Tensor:
        concentration = with_unit(
            guide.controller.posterior(layer, hidden).concentration, program.num_units
        )
        means.append(posterior_mean(concentration))
        return _executed(program, Dirichlet(concentration, validate_args=False).sample())

    program.network(tokens, route)
    return torch.stack(means)
