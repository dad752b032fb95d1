"""Is the guide any good? Importance weights against the exact joint.

Pareto k-hat, tighter bounds, the amortisation gap.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayes_router.checks import get_extra, require
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel, harden
from bayes_router.inference.sites import to_network, with_unit
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.transformer.nll import token_nll

ROWS = 16  # draws of one sequence that go through the network together


def draw_log_route(concentration: Tensor) -> Tensor:
    """Log of a draw from Dirichlet(concentration), exact where the draw itself underflows.

    [..., E] -> float64 [..., E].

    A Gamma(a) variable is g u^(1/a) with g ~ Gamma(a + 1) and u uniform (Marsaglia and Tsang 2000,
    section 6), so that log gamma = log g + log(u) / a needs no small number, and log route = log
    gamma - logsumexp(log gamma). At a = 0.01 a weight of exp(-100) is ordinary; in float32 it would
    be 0, and its log density infinite.
    """
    a = concentration.double()
    uniform = torch.rand_like(a).clamp_min(torch.finfo(torch.float64).tiny)
    log_gamma = torch._standard_gamma(a + 1).log() + uniform.log() / a
    return log_gamma - log_gamma.logsumexp(-1, keepdim=True)


def log_density_ratio(log_route: Tensor, q: Tensor, program: RoutingModel, layer: int) -> Tensor:
    """Log prior(route) - log Dirichlet(route; q), nats, float64 [...].

    Finite for every draw of `draw_log_route`.

    = sum_e (p_e - q_e) log route_e + log B(q) - log B(p), and - tilt . route - log Z where the
    prior is tilted. Written with the difference of the concentrations, so that the two large terms
    of tiny weights cancel before they are made.
    """
    prior = program.token_prior(layer)
    p, q = program.concentration[layer].double(), q.double()
    ratio = ((p - q) * log_route).sum(-1) + _log_beta(q) - _log_beta(p)
    if isinstance(prior, TiltedDirichlet):
        ratio = (
            ratio - (log_route.exp() * prior.tilt.double()).sum(-1) - prior.log_normaliser.double()
        )
    return ratio


def _log_beta(concentration: Tensor) -> Tensor:
    return concentration.lgamma().sum(-1) - concentration.sum(-1).lgamma()


class ImportanceWeights(NamedTuple):
    """Draws of the guide for one sequence, and what each is worth, token by token.

    All in nats, float64 [S, T].
    """

    log_likelihood: Tensor  # log p(y_t | tokens up to t, routes)
    log_ratio: Tensor  # sum over layers of log prior - log guide of the routes of token t

    def log_weight(self, length: int | None = None, likelihood_power: float = 1.0) -> Tensor:
        """Log weight of each draw for the prefix of `length` tokens, [S].

        Nothing looks ahead, so the first t terms of a sequence are the weights of its prefix.
        `likelihood_power` 1 is the exact joint. Training with a KL weight w pursues the cold
        posterior, proportional to likelihood^(1 / w) x prior: the guide's own target has power 1 /
        w.
        """
        total = self.log_ratio + likelihood_power * self.log_likelihood
        return total[:, :length].sum(1)


@torch.no_grad()
def importance_weights(
    program: RoutingModel,
    guide: RoutingGuide,
    tokens: Tensor,
    targets: Tensor,
    draws: int = 400,
    seed: int = 0,
) -> ImportanceWeights:
    """Draw the routes of one sequence from the guide and weigh them against the exact joint.

    Args:
        program: the generative program.
        guide: what draws.
        tokens: int64 [T], one sequence.
        targets: int64 [T]; -100 is not scored.
        draws: S.
        seed: of the draws; the caller's generator is left as it was.

    Raises:
        ValueError: not one sequence, or no draws.
    """
    require(
        tokens.dim() == 1 and len(tokens) > 0,
        "tokens",
        "one sequence, shape [T]",
        tuple(tokens.shape),
    )
    require(
        tokens.shape == targets.shape,
        "targets",
        f"the shape of tokens {tuple(tokens.shape)}",
        tuple(targets.shape),
    )
    require(draws >= 1, "draws", "at least 1", draws)
    likelihoods, ratios = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, draws, ROWS):
            rows = min(ROWS, draws - start)
            ratio = torch.zeros(rows, len(tokens), dtype=torch.float64, device=tokens.device)

            def route(layer: int, hidden: Tensor, ratio: Tensor = ratio) -> Tensor:
                q = with_unit(
                    guide.controller.posterior(layer, hidden).concentration, program.num_units
                )
                log_route = draw_log_route(q)
                ratio += log_density_ratio(log_route, q, program, layer).sum(-1)  # over units
                draw = log_route.exp().float()
                return to_network(
                    harden(draw) if program.straight_through else draw, program.num_units
                )

            logits = program.network(tokens.expand(rows, -1), route)
            likelihoods.append(-token_nll(logits, targets.expand(rows, -1)).double())
            ratios.append(ratio)
    return ImportanceWeights(torch.cat(likelihoods), torch.cat(ratios))


FARTHEST = 600.0
"""Nats from the largest weight to the least of the largest fifth: none of them is 0 in float64."""


def pareto_k(log_weight: Tensor | npt.NDArray[np.float64]) -> float:
    """Shape of the generalised Pareto tail of importance weights [S].

    Vehtari et al. 2024, arXiv 1507.02646.

    Below 0.5 their variance is finite; up to `k_hat_limit` importance sampling works; above 1 not
    even their mean exists. For a Dirichlet(q) that stands for a Dirichlet(p), k = max_e (1 - p_e /
    q_e) where that is positive. Weights that are all the same give -inf: the guide is the target.

    Raises:
        ValueError: weights that are not finite, fewer than 25, or arviz-stats is not installed.
    """
    values = np.asarray(log_weight, dtype=np.float64)
    require(
        values.ndim == 1 and len(values) >= 25,
        "log_weight",
        "at least 25 draws, shape [S]",
        values.shape,
    )
    require(bool(np.isfinite(values).all()), "log_weight", "finite numbers", float(values.min()))
    if np.ptp(values) < 1e-9:
        return float("-inf")
    # where weights lie so far apart that those of the tail are 0 beside the largest, the fit would
    # be of zeros, and call the worst good: k grows as the logarithms, and is read off them closer
    closer = max(float(values.max() - np.quantile(values, 0.8)) / FARTHEST, 1.0)
    values = values / closer
    # it takes log likelihoods, and weighs by their inverse as LOO does
    return closer * float(smoother().psislw(-values)[1])


def smoother() -> Any:
    """What fits a tail: arviz-stats, which is an extra."""
    try:
        from arviz_stats.base import array_stats
    except ImportError as error:
        raise ValueError(
            f"pareto_k: expected the package arviz-stats; got none; {get_extra('diagnostics')}"
        ) from error
    return array_stats


def k_hat_limit(draws: int) -> float:
    """Below which a k-hat of so many draws is good.

    min(1 - 1 / log10(draws), 0.7) (Vehtari et al. 2024, arXiv 1507.02646).
    """
    return min(1 - 1 / math.log10(draws), 0.7)


def effective_sample_size(log_weight: Tensor) -> float:
    """(sum w)^2 / sum w^2 over S: the share of the draws that importance sampling makes use of."""
    return float(
        (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp() / len(log_weight)
    )


def importance_bound(log_weight: Tensor, draws: int) -> tuple[float, float]:
    """IWAE bound E log(1/K sum_k w_k) <= log p(y) (Burda et al. 2016, arXiv 1509.00519).

    Mean over groups, standard error.

    K = 1 is the ELBO by sampling. Nats of the whole sequence.
    """
    groups = len(log_weight) // draws
    require(groups >= 1, "draws", f"at most the {len(log_weight)} weights there are", draws)
    values = log_weight[: groups * draws].view(groups, draws).logsumexp(1) - np.log(draws)
    return float(values.mean()), float(values.std() / groups**0.5) if groups > 1 else float("nan")
