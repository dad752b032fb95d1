"""Draws by row: a function of the row's seed and the layer, whatever stands beside the row."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_router.inference.draws import RowDraws
from bayes_router.inference.sites import route_site

LAYERS = 3
Q = torch.tensor([1.0, 2.0, 0.7])


def drawn(seeds: list[int]) -> Tensor:
    """Routes [L, B, T, E] where every layer and row has the same posterior."""
    with RowDraws(seeds):
        routes = [
            pyro.sample(route_site(layer), dist.Dirichlet(Q.expand(len(seeds), 5, 3)).to_event(0))
            for layer in range(LAYERS)
        ]
    return torch.stack(routes)


def test_every_layer_and_every_row_has_draws_of_its_own() -> None:
    routes = drawn([11, 12])
    for layer in range(LAYERS):
        for other in range(layer):
            assert (routes[layer] - routes[other]).abs().amax((1, 2)).min() > 1e-3
    assert (routes[:, 0] - routes[:, 1]).abs().amax((1, 2)).min() > 1e-3


def test_a_row_has_the_same_draws_in_any_company() -> None:
    together = drawn([11, 12, 13])
    torch.rand(5)
    assert torch.equal(drawn([13, 11]), together[:, [2, 0]])
