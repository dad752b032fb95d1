"""The compute-aware prior over routes as Pyro distributions."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayes_router.checks import not_negative, require
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.tilt import tilted_moments


class DirichletPrior(nn.Module):
    """p(route) = Dirichlet(route; concentration_l), tilted where the price is above 0.

    The tilt is exp(-price * cost_ratio_l . route).

    Its values move inside the same tensors, where a captured CUDA graph reads them.

    Args:
        concentration: [L, E], or of each unit, [L, R, E].
        cost_ratio: of the experts, [E], or of the experts in each layer, [L, E], or of each unit,
            [L, R, E]; what `price` multiplies.
        price: nats per unit of cost, see `TiltedDirichlet`.

    Raises:
        ValueError: a concentration that is not positive or of another shape, a price below 0 or
            without costs.
    """

    concentration: Tensor
    cost_ratio: Tensor
    log_normaliser: Tensor  # [L] or [L, R], of the tilted prior
    tilt: Tensor  # price * cost_ratio

    def __init__(self, concentration: Tensor, cost_ratio: Tensor | None = None, price: float = 0.0):
        super().__init__()
        self.register_buffer("concentration", torch.empty(0), persistent=False)
        costs = torch.zeros(0) if cost_ratio is None else cost_ratio
        _check_costs(costs, concentration)
        self.register_buffer("cost_ratio", costs, persistent=False)
        for name, value in (
            (
                "log_normaliser",
                torch.zeros(self._of_layers(concentration, costs)[0].shape[:-1]).to(costs),
            ),
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
        """Move the prior to another concentration and price.

        A schedule calls this between steps.
        """
        shape = (
            f"shape {list(self.concentration.shape)}"
            if self.concentration.numel()
            else "shape [L, E] or [L, R, E]"
        )
        fits = concentration.dim() in (2, 3) and self.concentration.shape in (
            (0,),
            concentration.shape,
        )
        require(fits, "concentration", shape, tuple(concentration.shape))
        numbers = concentration.is_floating_point() and bool(
            ((concentration > 0) & (concentration < math.inf)).all()
        )
        require(numbers, "concentration", "positive numbers", concentration.tolist())
        price = not_negative("price", price)
        require(
            price == 0 or len(self.cost_ratio) > 0,
            "price",
            "0 where no cost_ratio was given",
            price,
        )
        moved = price != self._price or not torch.equal(concentration, self._given)
        if moved and price > 0:
            # log Z of every layer; from values on the CPU, where small float64 work is cheap and no
            # GPU waits for it
            of_layers, paid = self._of_layers(concentration.cpu(), torch.tensor(self._cost))
            moments = tilted_moments(of_layers, price * paid)
            self.log_normaliser.copy_(moments.log_normaliser, non_blocking=True)
            torch.mul(self.cost_ratio, price, out=self.tilt)
        if moved and self.concentration.dtype == concentration.dtype and self.concentration.numel():
            self.concentration.copy_(concentration, non_blocking=True)
        elif moved:
            self.concentration = concentration.to(self.cost_ratio.device, copy=True)
        self._given, self._price = concentration, price

    def forward(self, layer: int, shape: torch.Size = torch.Size()) -> dist.TorchDistribution:  # noqa: B008
        """The prior of the routes of a layer, batch shape `shape`, [(R,) B, T].

        By default that of one token.
        """
        require(
            0 <= layer < len(self.concentration),
            "prior",
            f"{layer + 1} layers or more",
            len(self.concentration),
        )
        concentration = _of_units(self.concentration[layer], 1, shape)
        batch = shape if len(shape) else concentration.shape[:-1]  # [R], where units differ
        concentration = concentration.expand(*batch, -1)
        if self.price == 0:
            return dist.Dirichlet(concentration, validate_args=False)
        tilt = self.tilt if self.tilt.dim() == 1 else _of_units(self.tilt[layer], 1, shape)
        log_normaliser = _of_units(self.log_normaliser[layer], 0, shape)
        return TiltedDirichlet(concentration, tilt, log_normaliser).expand(batch)

    @staticmethod
    def _of_layers(concentration: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
        """Both by layer, and by unit where one of them is."""
        if concentration.dim() == 2 and costs.dim() == 3:
            return concentration[:, None], costs
        return concentration, costs[
            :, None
        ] if concentration.dim() == 3 and costs.dim() == 2 else costs


def _check_costs(costs: Any, concentration: Tensor) -> None:
    """One for each expert, of all layers or of each; a tensor of finite numbers."""
    require(isinstance(costs, Tensor), "cost_ratio", "a tensor", type(costs).__name__)
    L, E = concentration.shape[0], concentration.shape[-1]
    shape = tuple(costs.shape)
    fits = shape in ((0,), (E,)) or (len(shape) in (2, 3) and shape[:: len(shape) - 1] == (L, E))
    of_layers = f"the {E} experts of the concentration, or its {L} layers by these experts"
    require(fits, "cost_ratio", of_layers, shape)
    require(bool(costs.isfinite().all()), "cost_ratio", "finite numbers", costs.tolist())


def _of_units(x: Tensor, rest: int, shape: torch.Size) -> Tensor:
    """What a layer's units have, [R, ...] with `rest` dimensions after R, beside batch and token.

    [R, 1, 1, ...].
    """
    if x.dim() == rest or len(shape) == 0:
        return x
    return x.squeeze(0) if len(shape) == 2 else x[:, None, None]
