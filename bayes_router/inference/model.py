"""The generative program: routes under the prior, tokens under the routed network.

route_l[b, t] ~ Dirichlet(concentration_l)                        l = 0 .. L - 1
y[b, t]       ~ Categorical(logits[b, t]),  logits = network(tokens, route)
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

from bayes_router.checks import require
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.tilt import tilted_moments
from bayes_router.types import IGNORED, Route, hidden_site, route_site

_serial = count()


class Named(nn.Module):
    """A module that shows its parameters to Pyro under a name of its own.

    Pyro's parameter store is global: two models under one name would share their weights in silence. So every instance, and
    every copy of one, gets its own. Under `pyro.settings.context(module_local_params=True)` nothing is registered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pyro_name = f"{type(self).__name__}_{next(_serial)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pyro_name = f"{type(self).__name__}_{next(_serial)}"

    def show_parameters(self, module: nn.Module) -> None:
        """Show the parameters of `module` to Pyro."""
        if not pyro.settings.get("module_local_params"):
            pyro.module(self.pyro_name, module)


class RoutingModel(Named):
    """p(targets, routes | tokens), in nats per token: all log densities are scaled by 1 / (B T).

    Args:
        network: (tokens, route callback) -> logits [B, T, V]; see `RoutedTransformer`.
        concentration: of the prior, [L, E].
        cost_ratio: of the experts, [E], or of the experts in each layer, [L, E]; what `price` multiplies.
        kl_weight: scales the latent sites, hence the KL, and nothing else; 1 is the literal ELBO.
        price: nats per unit of cost by which the prior is tilted, see `TiltedDirichlet`.

    With `straight_through` set, the network executes the argmax of each draw, and its gradient is the draw's.

    Raises:
        ValueError: concentration not positive or not [L, E], or a kl_weight not positive.
    """

    concentration: Tensor
    cost_ratio: Tensor
    log_normaliser: Tensor  # [L], of the tilted prior
    tilt: Tensor  # price x cost_ratio
    kl_scale: Tensor  # [], kl_weight

    def __init__(
        self,
        network: Callable[[Tensor, Route], Tensor],
        concentration: Tensor,
        cost_ratio: Tensor | None = None,
        kl_weight: float = 1.0,
        price: float = 0.0,
    ):
        super().__init__()
        self.network = network
        self.straight_through = False
        self.register_buffer("concentration", torch.empty(0), persistent=False)
        self.register_buffer("cost_ratio", torch.zeros(0) if cost_ratio is None else cost_ratio, persistent=False)
        for name, value in (
            ("log_normaliser", torch.zeros(len(concentration)).to(self.cost_ratio)),
            ("tilt", torch.zeros_like(self.cost_ratio)),
            ("kl_scale", torch.ones((), dtype=torch.float64, device=self.cost_ratio.device)),
        ):
            self.register_buffer(name, value, persistent=False)
        self._cost, self._given, self.price = self.cost_ratio.tolist(), torch.empty(0), -1.0
        self.set_objective(concentration, kl_weight, price)

    def set_objective(self, concentration: Tensor, kl_weight: float, price: float = 0.0) -> None:
        """Move the prior and the weight of its KL; a schedule calls this between steps.

        The values move inside the same tensors, where a captured CUDA graph reads them.
        """
        require(concentration.dim() == 2, "concentration", "shape [L, E]", tuple(concentration.shape))
        require(bool((concentration > 0).all()), "concentration", "positive numbers", concentration.tolist())
        require(kl_weight > 0, "kl_weight", "a positive number", kl_weight, "a tiny one stands for zero")
        require(price >= 0, "price", "0 or more", price)
        require(price == 0 or len(self.cost_ratio) > 0, "price", "0 where no cost_ratio was given", price)
        moved = price != self.price or not torch.equal(concentration, self._given)
        if moved and price > 0:
            # log Z of every layer; from values on the CPU, where small float64 work is cheap and no GPU waits for it
            moments = tilted_moments(concentration.cpu(), price * torch.tensor(self._cost))
            self.log_normaliser.copy_(moments.log_normaliser, non_blocking=True)
            torch.mul(self.cost_ratio, price, out=self.tilt)
        if moved and self.concentration.shape == concentration.shape and self.concentration.dtype == concentration.dtype:
            self.concentration.copy_(concentration, non_blocking=True)
        elif moved:
            self.concentration = concentration.to(self.cost_ratio.device, copy=True)
        self.kl_scale.fill_(kl_weight)
        self._given, self.kl_weight, self.price = concentration, kl_weight, price

    def prior(self, layer: int) -> dist.TorchDistribution:
        """Of one token's route in a layer."""
        if self.price > 0:
            tilt = self.tilt if self.tilt.dim() == 1 else self.tilt[layer]
            return TiltedDirichlet(self.concentration[layer], tilt, self.log_normaliser[layer])
        return dist.Dirichlet(self.concentration[layer], validate_args=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens int64 [B, T] -> targets [B, T], observed where given; -100 is not scored."""
        if isinstance(self.network, nn.Module):
            self.show_parameters(self.network)
        B, T = tokens.shape

        def route(layer: int, hidden: Tensor) -> Tensor:  # [B, T, D] -> [B, T, E]
            pyro.deterministic(hidden_site(layer), hidden, event_dim=1)  # what the guide may look at
            with poutine.scale(scale=self.kl_scale):
                draw = pyro.sample(route_site(layer), self.prior(layer).expand((B, T)))
            return harden(draw) if self.straight_through else draw

        with poutine.scale(scale=1 / (B * T)), pyro.plate("batch", B, dim=-2), pyro.plate("token", T, dim=-1):
            logits = self.network(tokens, route)
            logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
            scored = True if targets is None else targets != IGNORED
            with poutine.mask(mask=scored):
                observed = None if targets is None else targets.clamp_min(0)
                return pyro.sample("targets", NextToken(logits), obs=observed)


def harden(route: Tensor) -> Tensor:
    """One-hot of the argmax of route [..., E], with the gradient of `route` (straight-through)."""
    hard = nn.functional.one_hot(route.argmax(-1), route.shape[-1]).to(route.dtype)
    return hard + route - route.detach()


class NextToken(dist.TorchDistribution):
    """Categorical over the vocabulary by logits [B, T, V], with the fused log density of cross-entropy."""

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.nonnegative_integer

    def __init__(self, logits: Tensor):
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """[B, T], nats."""
        return -nn.functional.cross_entropy(self.logits.flatten(0, -2), value.flatten(), reduction="none").view(value.shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Token ids, int64."""
        return torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(sample_shape)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "NextToken":
        """Broadcast over outer plates (particles)."""
        return NextToken(self.logits.expand((*batch_shape, self.logits.shape[-1])))
