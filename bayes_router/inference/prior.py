"""The compute-aware prior over routes as Pyro distributions."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.tilt import tilted_moments


class DirichletPrior(nn.Module):
    """p(route) = Dirichlet(route; concentration_l), tilted by exp(-price * cost_ratio_l . route) at a price above 0.

    Its values move inside the same tensors, where a captured CUDA graph reads them.

    Args:
        concentration: [L, E].
        cost_ratio: of the experts, [E], or of the experts in each layer, [L, E]; what `price` multiplies.
        price: nats per unit of cost, see `TiltedDirichlet`.

    Raises:
        ValueError: a concentration that is not positive or not [L, E], a price below 0 or without costs.
    """

    concentration: Tensor
    cost_ratio: Tensor
    log_normaliser: Tensor  # [L], of the tilted prior
    tilt: Tensor  # price * cost_ratio

    def __init__(self, concentration: Tensor, cost_ratio: Tensor | None = None, price: float = 0.0):
        super().__init__()
        self.register_buffer("concentration", torch.empty(0), persistent=False)
        costs = torch.zeros(0) if cost_ratio is None else cost_ratio
        self.register_buffer("cost_ratio", costs, persistent=False)
        for name, value in (
            ("log_normaliser", torch.zeros(len(concentration)).to(costs)),
            ("tilt", torch.zeros_like(costs)),
        ):
            self.register_buffer(name, value, persistent=False)
        self._cost, self._given, self._price = costs.tolist(), torch.empty(0), -1.0
        self.move(concentration, price)

    @property
    def price(self) -> float:
        """Nats per unit of cost; `move` sets it."""
        return self._price

    def move(self, concentration: Tensor, price: float = 0.0) -> None:
        """Move the prior to another concentration and price; a schedule calls this between steps."""
        shape = (
            f"shape [{len(self.concentration)}, {self.concentration.shape[1]}]"
            if self.concentration.numel()
            else "shape [L, E]"
        )
        fits = concentration.dim() == 2 and self.concentration.shape in ((0,), concentration.shape)
        require(fits, "concentration", shape, tuple(concentration.shape))
        require(
            bool((concentration > 0).all()),
            "concentration",
            "positive numbers",
            concentration.tolist(),
        )
        require(price >= 0, "price", "0 or more", price)
        require(
            price == 0 or len(self.cost_ratio) > 0,
            "price",
            "0 where no cost_ratio was given",
            price,
        )
        experts = f"the {concentration.shape[1]} experts of the concentration"
        costs = tuple(self.cost_ratio.shape)
        require(costs in ((0,), costs[:-1] + concentration.shape[1:]), "cost_ratio", experts, costs)
        moved = price != self._price or not torch.equal(concentration, self._given)
        if moved and price > 0:
            # log Z of every layer; from values on the CPU, where small float64 work is cheap and no
            # GPU waits for it
            moments = tilted_moments(concentration.cpu(), price * torch.tensor(self._cost))
            self.log_normaliser.copy_(moments.log_normaliser, non_blocking=True)
            torch.mul(self.cost_ratio, price, out=self.tilt)
        if moved and self.concentration.dtype == concentration.dtype and self.concentration.numel():
            self.concentration.copy_(concentration, non_blocking=True)
        elif moved:
            self.concentration = concentration.to(self.cost_ratio.device, copy=True)
        self._given, self._price = concentration, price

    def forward(self, layer: int, shape: torch.Size = torch.Size()) -> dist.TorchDistribution:  # noqa: B008
        """Of the routes of a layer, batch shape `shape`: by default that of one token."""
        require(
            0 <= layer < len(self.concentration),
            "prior",
            f"{layer + 1} layers or more",
            len(self.concentration),
        )
        concentration = self.concentration[layer]
        if self.price == 0:
            return dist.Dirichlet(concentration, validate_args=False).expand(shape)
        tilt = self.tilt if self.tilt.dim() == 1 else self.tilt[layer]
        return TiltedDirichlet(concentration, tilt, self.log_normaliser[layer]).expand(shape)
