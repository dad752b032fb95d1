"""Programs whose posterior is known in closed form."""

import torch
from torch import Tensor, nn

from bayes_router.diagnostics.reading import Reading
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.controller import MetaController
from bayes_router.types import Route

# [E, V]: what each expert says of the next token
THETA = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])


class MixtureNetwork(nn.Module):
    """p(y | route) = sum_e route_e theta[e, y].

    Every route's posterior is a known mixture of two Dirichlets.
    """

    def __init__(self, theta: Tensor = THETA):
        super().__init__()
        self.register_buffer("theta", theta)

    def forward(self, tokens: Tensor, route: Route) -> Tensor:
        weights = route(0, torch.zeros(*tokens.shape, 1))
        assert isinstance(weights, Tensor)
        return (weights @ self.get_buffer("theta").to(weights)).clamp_min(1e-30).log()


class BlindNetwork(MixtureNetwork):
    """The likelihood does not depend on the route: the exact posterior is the prior."""

    def __init__(self) -> None:
        super().__init__(THETA[:1].expand(2, -1))


def toy(
    network: nn.Module, prior: Tensor, guide: Tensor, price: float = 0.0
) -> tuple[RoutingModel, RoutingGuide]:
    """A program with prior [1, E] and a guide that answers `guide` [1, E] for every token."""
    program = RoutingModel(network, prior, torch.linspace(1, 0.2, prior.shape[1]), price=price)
    controller = MetaController(1, 1, prior.shape[1], hidden=0, floor=0.001)
    controller.start_at(guide)
    return program, RoutingGuide(program, controller)


def exact_posterior_mean(prior: Tensor, targets: Tensor, theta: Tensor = THETA) -> Tensor:
    """E[route | y], [..., E], for one prior [E].

    Mixture over e of Dirichlet(prior + 1_e), weights prior_e theta[e, y].
    """
    component = (prior + torch.eye(len(prior))) / (prior.sum() + 1)  # [E of mixture, E]
    weight = prior * theta[:, targets].movedim(0, -1)  # [..., E]
    return (weight / weight.sum(-1, keepdim=True)) @ component


def reading(concentration: Tensor, tokens: Tensor | None = None) -> Reading:
    """A reading of concentrations [L, B, T, E] of one unit, routed by argmax."""
    concentration = concentration.unsqueeze(3)
    if tokens is None:
        tokens = torch.zeros(concentration.shape[1:3], dtype=torch.int64)
    return Reading(
        tokens, tokens, torch.zeros(tokens.shape), concentration, concentration.argmax(-1)
    )
