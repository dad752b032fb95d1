"""The generative program: routes under the prior, targets under the routed network.

The literal joint, nothing scaled.

route_l[b, t] ~ prior_l                      l = 0 .. L - 1; route_l[r, b, t] where R > 1
y[b, t]       ~ likelihood(output[b, t]),    output = network(tokens, route)
"""

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.inference.fits import (
    broadcast_prior,
    check_experts,
    check_likelihood,
    check_network,
    check_prior,
    check_pyros,
    refuse_tracing,
    scored,
)
from bayes_router.inference.likelihood import Likelihood, NextToken
from bayes_router.inference.parameters import Named
from bayes_router.inference.prior import DirichletPrior
from bayes_router.inference.sites import TARGETS, Plates, is_route_site, route_site
from bayes_router.inference.weighted import PerToken, warn_of_weight
from bayes_router.types import Route

Prior = Callable[[int, torch.Size], dist.TorchDistribution]
"""(layer, shape) -> distribution of the routes of a layer, event shape [E].

Its batch shape is `shape`, or broadcasts to it: [B, T], and [R, B, T] where a layer has R > 1
routing units."""


class KeptPass(NamedTuple):
    """A pass of the network that a guide has made.

    The model need not repeat it for the same routes.
    """

    tokens: Tensor
    routes: list[Tensor]  # as the sites hold them
    output: Tensor
    state: tuple[object, ...]


class _OneDraw(Messenger):
    """Weights of the network in their own shape.

    `Predictive` puts a 1 before it for each plate of the guide.
    """

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if is_route_site(msg["name"]) or site_is_subsample(msg):
            return
        shape, value = msg["fn"].shape(), msg["value"]
        require(
            value.numel() == shape.numel(),
            f"particles of {msg['name']}",
            "one after another, where weights are random: the network draws them once a pass",
            tuple(value.shape),
            "vectorize_particles=False, Predictive(parallel=False)",
        )
        msg["value"] = value.reshape(shape)


class Through(Enum):
    """Whose gradient stands for that of an executed choice, which has none."""

    DRAW = "draw"
    MEAN = "mean"  # of the posterior: less noise, and none where a draw lies in a corner


class RoutingModel(Named):
    """The joint p(targets, routes | tokens).

    What it says is what Pyro's estimators, samplers and handlers get, in nats of the batch.

    What is per token, weighted or annealed belongs to the objective: `RoutingELBO(kl_weight=...)`,
    or `tempered(model, ...)` for an estimator or sampler of Pyro's own.

    Args:
        network: (tokens [B, T], route callback) -> output [B, ...]; see `RoutedTransformer`.
            Weights of it may be random variables (PyroSample): they are drawn once a pass, outside
            of all plates.
        prior: concentration [L, E] of a `DirichletPrior`, or any (layer, shape) -> distribution
            over the E experts.
        cost_ratio: of the experts, [E], or of the experts in each layer, [L, E]; what `price`
            multiplies.
        price: nats per unit of cost by which the prior is tilted, see `TiltedDirichlet`.
        likelihood: output of the network -> distribution of the targets, one a token (batch shape
            [B, T]) or one a row ([B, 1]); next tokens by default.
        name: of the network's parameters in Pyro's store, see `Named`.
        kl_weight: of programs of before, (network, prior, cost_ratio, kl_weight, price); see
            `inference/weighted.py`.

    With `straight_through` set, the network executes the argmax of each draw, and its gradient is
    the draw's; or with `through` "mean" the posterior mean's, which does not hang on the draw.

    Raises:
        ValueError: concentration not positive or not [L, E]; a price below 0, without costs, or
            beside a prior of one's own.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Route], Tensor],
        prior: Tensor | Prior,
        cost_ratio: Tensor | None = None,
        price: float = 0.0,
        *of_before: float,
        likelihood: Likelihood = NextToken,
        name: str | None = None,
        kl_weight: float | None = None,
    ):
        super().__init__(name)
        if of_before:
            kl_weight, (price,) = price, of_before
        if kl_weight is not None:
            warn_of_weight(kl_weight)
        self.weighted_by = kl_weight
        self.network, self.likelihood, self.straight_through = network, likelihood, False
        self.through = Through.DRAW.value
        check_network(network)
        require(
            isinstance(prior, Tensor) or (price == 0 and cost_ratio is None),
            "price",
            "0 beside a callable prior",
            price,
            "a prior of one's own holds its costs itself",
        )
        self.prior: Prior = (
            DirichletPrior(prior, cost_ratio, price) if isinstance(prior, Tensor) else prior
        )
        check_prior(self.prior, network)
        self._kept: KeptPass | None = None

    @property
    def dirichlet_prior(self) -> DirichletPrior:
        """The compute-aware prior.

        Raises:
            ValueError: the prior is one of the user's own.
        """
        prior = self.prior
        fix = "pass the concentration to RoutingModel"
        require(
            isinstance(prior, DirichletPrior),
            "prior",
            "a DirichletPrior",
            type(prior).__name__,
            fix,
        )
        assert isinstance(prior, DirichletPrior)
        return prior

    @property
    def concentration(self) -> Tensor:
        """The concentration of the compute-aware prior, [L, E]."""
        return self.dirichlet_prior.concentration

    @property
    def cost_ratio(self) -> Tensor:
        """What the price of the compute-aware prior multiplies, [E] or [L, E]."""
        return self.dirichlet_prior.cost_ratio

    @property
    def price(self) -> float:
        """The price of the compute-aware prior, nats per unit of cost; `set_prior` moves it."""
        return self.dirichlet_prior.price

    def set_prior(self, concentration: Tensor, price: float = 0.0) -> None:
        """Move the compute-aware prior; a schedule calls this between steps."""
        self.dirichlet_prior.move(concentration, price)

    def token_prior(self, layer: int) -> dist.TorchDistribution:
        """The prior of one route of a layer."""
        return self.prior(layer, torch.Size())

    @property
    def kl_weight(self) -> float:
        """Not here: the model is the joint."""
        raise AttributeError(
            "kl_weight belongs to the objective: RoutingELBO(kl_weight=...), NegativeELBO or "
            "tempered(...)"
        )

    @property
    def num_units(self) -> int:
        """Routing units of a layer, R: what the network says, or one."""
        return int(getattr(self.network, "num_units", 1))

    def show_network(self) -> None:
        """Show the parameters of the network to Pyro."""
        if isinstance(self.network, nn.Module):
            self.show_parameters(self.network)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens int64 [B, T] -> targets, observed where given; a target of -100 is not scored.

        Raises:
            ValueError: a prior or a likelihood of a shape that does not fit, or a pass under
                `torch.jit`'s tracer.
        """
        refuse_tracing()
        self.show_network()
        if self.weighted_by is None:
            return self._joint(tokens, targets)
        with PerToken(self.weighted_by, tokens.numel()):
            return self._joint(tokens, targets)

    def _joint(self, tokens: Tensor, targets: Tensor | None) -> Tensor:
        plates = Plates(tokens, self.num_units)
        said = self.likelihood(plates.split(self._output(tokens, plates)))
        per_token = check_likelihood(said, plates)
        observed, counts = (None, True) if targets is None else scored(said, targets)
        with plates.targets(per_token), poutine.mask(mask=counts):
            value: Tensor = pyro.sample(TARGETS, said, obs=observed)
        return value

    def _output(self, tokens: Tensor, plates: Plates) -> Tensor:
        """Output of the network on routes drawn under the prior.

        Of a replayed guide, as the guide has left it.
        """
        kept, self._kept = self._kept, None
        if kept is None or kept.tokens is not tokens or kept.state != self._state():
            drawn: dict[int, Tensor] = {}
        else:
            drawn = {layer: self._draw(layer, plates) for layer in range(len(kept.routes))}
            if all(drawn[layer] is route for layer, route in enumerate(kept.routes)):
                return kept.output

        def route(layer: int, hidden: Tensor) -> Tensor:  # [rows, T, D] -> [rows, T, (R,) E]
            return self.executed(
                plates, drawn[layer] if layer in drawn else self._draw(layer, plates)
            )

        with _OneDraw():
            return self.network(plates.repeat(tokens), route)

    def _draw(self, layer: int, plates: Plates) -> Tensor:
        """The site of a layer's routes, [(R,) B, T, E]."""
        shape, name = plates.route_shape, route_site(layer)
        fn = self.prior(layer, shape)
        check_pyros(f"prior of {name}", fn)
        E = check_experts(f"prior of {name}", fn, self.network)
        fn = broadcast_prior(f"prior of {name}", fn, shape)
        with plates.routes():
            value: Tensor = pyro.sample(name, fn)
        require(
            value.shape[-1] == E,
            f"guide of {name}",
            f"the {E} experts of the prior",
            value.shape[-1],
        )
        return value

    def executed(self, plates: Plates, value: Tensor, posterior: Any = None) -> Tensor:
        """What the network executes for the value of a route site, [rows, T, E].

        The posterior, where there is one, may give the gradient.
        """
        weights = plates.from_site(value)
        if not self.straight_through:
            return weights
        by_mean = posterior is not None and self.through == Through.MEAN.value
        return harden(weights, plates.from_site(posterior.mean) if by_mean else None)

    def keep(self, tokens: Tensor, routes: list[Tensor], output: Tensor) -> None:
        """Let the next pass use `output` if nothing moved in between.

        Its tokens and draws must be these very tensors.
        """
        self._kept = KeptPass(tokens, routes, output, self._state())

    def _state(self) -> tuple[object, ...]:
        """What a pass hangs on beside tokens and routes."""
        network = self.network
        parameters = network.parameters() if isinstance(network, nn.Module) else ()
        versions = sum(p._version for p in parameters if not p.is_inference())
        return (torch.is_grad_enabled(), self.straight_through, id(network), versions)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no pass of another's to use."""
        return {**super().__getstate__(), "_kept": None}


def harden(route: Tensor, through: Tensor | None = None) -> Tensor:
    """One-hot of the argmax of route [..., E], with the gradient of `route` (straight-through).

    With `through`, of the same shape, with its gradient.
    """
    hard = nn.functional.one_hot(route.argmax(-1), route.shape[-1]).to(route.dtype)
    through = route if through is None else through
    return hard + through - through.detach()
