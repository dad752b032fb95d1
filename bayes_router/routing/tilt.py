"""A Dirichlet tilted by a price, in numbers.

Its KL, normaliser, mean, variance, expected entropy, and exact draws.

p(route) = Dirichlet(route; a) exp(-tilt . route) / Z, tilt = price * cost ratio of each expert.
With J[f] = (1 / 2 pi i) int f(s) e^s prod_e (s + tilt_e)^(-a_e) ds over a contour around the
singularities (the inverse Laplace transform, at 1, of a product of Gamma transforms):

    Z = Gamma(a_0) J[1]      E[route_e] = a_e J[1 / (s + tilt_e)] / J[1]
    E[route_e^t] = Gamma(a_e + t) / Gamma(a_e) * J[(s + tilt_e)^(-t)] / J[1]

The derivative of the last at t = 1 gives the entropy.

The contour is the parabola s = m (1 + i u)^2 of Weideman and Trefethen (2007, Math. Comp. 76),
moved through the saddle of the integrand where concentrations are large; the midpoint rule on it
converges geometrically.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.routing.posterior import dirichlet_kl, posterior_mean

NODES = 64
LEAST_SADDLE = 4.0


class TiltedMoments(NamedTuple):
    """The moments of a tilted Dirichlet; float64."""

    log_normaliser: Tensor  # [...], log Z = log E_Dirichlet(a)[exp(-tilt . route)]
    mean: Tensor  # [..., E]
    expected_entropy: Tensor  # [...], nats
    variance: Tensor  # [..., E]


def tilted_kl(q: Tensor, concentration: Tensor, tilt: Tensor, log_normaliser: Tensor) -> Tensor:
    """KL(Dirichlet(q) || Dirichlet(concentration) tilted by exp(-tilt . route)), in nats.

    = KL(Dirichlet(q) || Dirichlet(concentration)) + tilt . E_q[route] + log Z. q, concentration and
    tilt broadcast over [..., E], log Z over [...]; a tilt of 0 has log Z = 0.
    """
    return (
        dirichlet_kl(q, concentration) + (posterior_mean(q) * tilt.to(q)).sum(-1) + log_normaliser
    )


def tilted_moments(concentration: Tensor, tilt: Tensor) -> TiltedMoments:
    """Moments of Dirichlet(concentration) tilted by exp(-tilt . route).

    Args:
        concentration: [..., E] > 0.
        tilt: [E], or broadcastable to concentration: nats per unit of weight on each expert; of
            either sign.

    Returns:
        Exact to about 1e-9 for total concentrations from 1e-3 to 1e4.
    """
    a, cost = concentration.double(), tilt.double()
    # exp(-tilt . route) = exp(-shift) exp(-(tilt - shift) . route), for weights sum to 1
    shift = cost.min()
    cost = cost - shift
    m = _saddle(a, cost).unsqueeze(-1)  # [..., 1]
    step = 6 / (m.sqrt() * NODES)  # |e^s| has fallen to e^-36 of its top at the last node
    u = step * (torch.arange(NODES, dtype=torch.float64, device=a.device) + 0.5)  # [..., N]
    s = m * torch.complex(torch.ones_like(u), u).square()
    away = s.unsqueeze(-2) + cost.unsqueeze(-1)  # [..., E, N]
    log_away = away.log()
    exponent = s - (a.unsqueeze(-1) * log_away).sum(-2)
    top = m - (a * (m + cost).log()).sum(-1, keepdim=True)  # at u = 0
    weight = torch.complex(torch.ones_like(u), u) * (exponent - top).exp()
    base = weight.real.sum(-1)  # J[1] up to a factor
    inverse = (weight.unsqueeze(-2) / away).real.sum(-1) / base.unsqueeze(-1)  # [..., E]
    log_inverse = (weight.unsqueeze(-2) * log_away / away).real.sum(-1) / base.unsqueeze(-1)
    square = (weight.unsqueeze(-2) / away.square()).real.sum(-1) / base.unsqueeze(-1)
    factor = (2 * m * step / torch.pi).squeeze(-1)
    return TiltedMoments(
        log_normaliser=a.sum(-1).lgamma() + top.squeeze(-1) + (factor * base).log() - shift,
        mean=a * inverse,
        expected_entropy=-(a * ((a + 1).digamma() * inverse - log_inverse)).sum(-1),
        variance=a * (a + 1) * square - (a * inverse).square(),
    )


def _saddle(a: Tensor, cost: Tensor) -> Tensor:
    """Where the parabola crosses the axis, [...].

    Near the least of e^s prod_e (s + cost_e)^(-a_e) on it, or at 4 if larger.

    There sum_e a_e / (s + cost_e) = 1; a rough solution, by bisection, does.
    """
    low = torch.full_like(a[..., 0], LEAST_SADDLE)
    high = torch.maximum(a.sum(-1), low)
    for _ in range(20 if bool((high > low).any()) else 0):
        middle = (low + high) / 2
        before = (a / (middle.unsqueeze(-1) + cost)).sum(-1) > 1
        low, high = torch.where(before, middle, low), torch.where(before, high, middle)
    return high


def sample_tilted(concentration: Tensor, tilt: Tensor, num_samples: int) -> Tensor:
    """Exact draws [num_samples, ..., E], float64, by rejection.

    tilt [E], or broadcastable to concentration.

    The proposal normalises Gamma(a_e) draws of rate 1 + y_e / a_0, y_e = tilt_e - min tilt, whose
    density is that of the Dirichlet times (1 + y . route / a_0)^(-a_0); so a draw is kept with
    probability exp(-y . route) (1 + y . route / a_0)^a_0, which is at most 1. Logarithms of Gammas,
    log Gamma(a) = log Gamma(a + 1) + log(uniform) / a, keep sparse draws finite.
    """
    a = concentration.double().expand(num_samples, *concentration.shape)
    total = a.sum(-1)
    y = (tilt - tilt.amin(-1, keepdim=True)).double().expand_as(a)
    draws, pending = torch.empty_like(a), torch.ones_like(total, dtype=torch.bool)
    while pending.any():
        some, sum_, paying = a[pending], total[pending], y[pending]
        uniform = torch.rand_like(some).clamp_min(torch.finfo(torch.float64).tiny)
        log_gamma = torch._standard_gamma(some + 1).log() + uniform.log() / some
        route = (log_gamma - (1 + paying / sum_.unsqueeze(-1)).log()).softmax(-1)
        paid = (route * paying).sum(-1)
        kept = torch.rand_like(paid).log() < sum_ * (paid / sum_).log1p() - paid
        index = pending.nonzero()[kept]
        draws[tuple(index.T)] = route[kept]
        pending[tuple(index.T)] = False
    return draws
