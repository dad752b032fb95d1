"""The one formula of the posterior over a route, and what is known of a Dirichlet in closed form.

Every function takes `concentration` [..., E] > 0 in float32 or float64 and reduces the last
dimension.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Dirichlet
from torch.nn import functional as F


def posterior(raw: Tensor, floor: float) -> Dirichlet:
    """q(route | hidden) = Dirichlet(floor + softplus(raw)).

    raw [B, T, E] is the controller's output.

    Training, diagnostics, decoding: all call this. float32 at least, since Dirichlet sampling has
    no half precision.
    """
    concentration = floor + F.softplus(raw if raw.dtype == torch.float64 else raw.float())
    return Dirichlet(concentration, validate_args=False)


def inverse_softplus(above: Tensor) -> Tensor:
    """log(expm1(above)) of positive numbers of any size: of concentration - floor, the raw output.

    As it is written there it overflows, in float32 from 89 on.
    """
    return above + (-(-above).expm1()).log()


def posterior_mean(concentration: Tensor) -> Tensor:
    """E[route] = concentration / total, [..., E]."""
    return concentration / concentration.sum(-1, keepdim=True)


def entropy_of_mean(concentration: Tensor) -> Tensor:
    """H(E[route]) in nats: total uncertainty about the expert."""
    return categorical_entropy(posterior_mean(concentration))


def expected_entropy(concentration: Tensor) -> Tensor:
    """E[H(route)] = digamma(a_0 + 1) - sum_e (a_e / a_0) digamma(a_e + 1) in nats.

    What remains were the route known.
    """
    total = concentration.sum(-1)
    mean = posterior_mean(concentration)
    return torch.digamma(total + 1) - (mean * torch.digamma(concentration + 1)).sum(-1)


def mutual_information(concentration: Tensor) -> Tensor:
    """H(E[route]) - E[H(route)] in nats.

    The epistemic part, what a draw of the route would tell.
    """
    return entropy_of_mean(concentration) - expected_entropy(concentration)


def categorical_entropy(probability: Tensor) -> Tensor:
    """H = -sum_e p_e log p_e in nats; 0 log 0 = 0."""
    return -torch.special.xlogy(probability, probability).sum(-1)


def dirichlet_kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(Dirichlet(q) || Dirichlet(p)) in nats, q and p [..., E]; exact.

    = lgamma(q_0) - sum lgamma(q) - lgamma(p_0) + sum lgamma(p) + sum (q - p) (digamma(q) -
    digamma(q_0))
    """
    q_total, p_total = q.sum(-1), p.sum(-1)
    normalisers = q_total.lgamma() - q.lgamma().sum(-1) - p_total.lgamma() + p.lgamma().sum(-1)
    return normalisers + ((q - p) * (q.digamma() - q_total.digamma().unsqueeze(-1))).sum(-1)


def route_information(probability: Tensor) -> Tensor:
    """Mutual information of token and route over a text, nats: H(mean over tokens) - mean H(token).

    `probability` [..., N, E]: the distribution over experts of each of N tokens. Zero when all
    tokens route alike.
    """
    return categorical_entropy(probability.mean(-2)) - categorical_entropy(probability).mean(-1)


NODES = 96
TAIL = -12.0
# on [0, 1]; read here, for what is compiled cannot look into numpy
NODE, WEIGHT = (
    tuple(((x + shift) / 2).tolist())
    for x, shift in zip(np.polynomial.legendre.leggauss(NODES), (1, 0), strict=True)
)


def probability_of_largest(concentration: Tensor, expert: Tensor) -> Tensor:
    """P(route_e > route_f for all f != e) under Dirichlet(concentration), for one expert e a token.

    With independent g_f ~ Gamma(a_f), route = g / sum g, so the probability is int p_{a_e}(x)
    prod_f P(a_f, x) dx, P the regularised lower incomplete gamma function. Gauss-Legendre in log x
    over where p_{a_e} has its mass; below x = exp(-12), where P(a, x) = x^a / Gamma(a + 1) up to
    1e-5 relative, in closed form.

    Args:
        concentration: [..., E].
        expert: int64 [...].

    Returns:
        float64 [...], exact to about 1e-5.
    """
    alpha = concentration.double()
    chosen = alpha.gather(-1, expert.unsqueeze(-1)).squeeze(-1)
    others = alpha.masked_fill(
        torch.zeros_like(alpha).scatter(-1, expert.unsqueeze(-1), 1).bool(), torch.inf
    )
    spread = 9 / chosen.sqrt()
    low = (chosen.log() - spread).clamp_min(TAIL)
    high = (chosen + 9 * chosen.sqrt() + 30).log()
    node, weight = _gauss_legendre(alpha.device)
    u = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * node  # [..., N], log x
    x = u.exp()
    # log p(x) + log x, of log x
    density = chosen.unsqueeze(-1) * u - x - chosen.lgamma().unsqueeze(-1)
    for f in range(alpha.shape[-1]):
        other = others[..., f].unsqueeze(-1)
        below = torch.special.gammainc(other.clamp_max(1e300), x).log()
        density = density + torch.where(other.isinf(), 0.0, below)
    body = (high - low) * (density.exp() * weight).sum(-1)
    total = alpha.sum(-1)
    log_tail = total * TAIL - total.log() - (alpha + 1).lgamma().sum(-1) + chosen.log()
    return (body + torch.where(low > TAIL, 0.0, log_tail.exp())).clamp(0, 1)


@lru_cache(maxsize=8)
def _gauss_legendre(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], kept where they are used.

    A copy from the host waits for a GPU.
    """
    with torch.inference_mode(False):
        node, weight = (torch.tensor(x, dtype=torch.float64) for x in (NODE, WEIGHT))
        return node.to(device), weight.to(device)
