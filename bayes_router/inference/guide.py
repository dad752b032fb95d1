"""The amortised posterior over routes, as a Pyro guide."""

from collections.abc import Callable
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Dirichlet

from bayes_router.checks import require
from bayes_router.inference.fits import check_distribution, check_experts, refuse_tracing
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.parameters import Named
from bayes_router.inference.sites import Plates, is_route_site, route_site


class Controller(Protocol):
    """What answers for the posterior: `MetaController`, or one of your own."""

    def posterior(self, layer: int, hidden: Tensor) -> Any:
        """Hidden [B, T, D] -> distribution over routes.

        Batch shape [B, T, R] (or [B, T] where R = 1), event shape [E].
        """


class RoutingGuide(Named):
    """q(routes | tokens) = prod_l Dirichlet(route_l; controller_l(hidden_l)).

    It runs the network itself, drawing each layer's routes from the posterior given the hidden
    state there, and leaves the output for the model that is replayed against it: an SVI step is one
    forward pass. It never sees the targets: at inference there are none.

    TraceMeanField_ELBO's analytic KL is exact here although the posterior of a layer depends on
    draws of earlier layers: no route is, in the model, a descendant of another, the condition that
    its docstring states.

    Args:
        model: whose network is run.
        controller: (layer, hidden) -> posterior; a module's parameters are shown to Pyro.
        rest: a guide, (tokens, targets), of all other latents of the model: an autoguide over
            weights that are random.
        name: of the controller's parameters in Pyro's store, see `Named`.
    """

    def __init__(
        self,
        model: RoutingModel,
        controller: Controller,
        rest: Callable[..., Any] | None = None,
        name: str | None = None,
    ):
        super().__init__(name)
        fits = isinstance(model, RoutingModel)
        require(fits, "model", "a RoutingModel", type(model).__name__)
        known, wanted = hasattr(controller, "posterior"), "posterior(layer, hidden)"
        require(known, "controller", f"something with {wanted}", type(controller).__name__)
        self._model = (model,)  # not a submodule: its parameters are the model's
        self.controller, self.rest = controller, rest

    @property
    def model(self) -> RoutingModel:
        """The model that it is the posterior of."""
        return self._model[0]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """Draw all latents; the values of the routes by site.

        Raises:
            ValueError: the network draws a latent that `rest` does not, or the controller answers
                in another shape.
        """
        refuse_tracing()
        model = self.model
        model.show_network()
        if isinstance(self.controller, nn.Module):
            self.show_parameters(self.controller)
        plates = Plates(tokens, model.num_units)
        others = _Others(self._draw_rest(tokens, targets, plates))
        routes: dict[str, Tensor] = {}

        def route(layer: int, hidden: Tensor) -> Tensor:  # [rows, T, D] -> [rows, T, E]
            name = route_site(layer)
            posterior = self._posterior(layer, hidden, plates)
            with plates.routes():
                routes[name] = pyro.sample(name, posterior)
            return model.executed(plates, routes[name], posterior)

        with others:
            output = model.network(plates.repeat(tokens), route)
        if not others.met:  # sites inside the network have to come from the model's own pass
            model.keep(tokens, list(routes.values()), output)
        return routes

    def _posterior(self, layer: int, hidden: Tensor, plates: Plates) -> Any:
        """As the route site wants it: batch shape [*lead, (R,) B, T]."""
        q = self.controller.posterior(layer, hidden)
        name = route_site(layer)
        wanted = (*hidden.shape[:-1], *plates.units)
        check_distribution(f"posterior of {name}", q)
        fits = q.batch_shape in (wanted, (*hidden.shape[:-1], *(plates.units or (1,))))
        require(fits, f"posterior of {name}", f"batch shape {tuple(wanted)}", tuple(q.batch_shape))
        check_experts(f"posterior of {name}", q, self.model.network)
        if isinstance(q, Dirichlet):
            return dist.Dirichlet(plates.to_site(q.concentration), validate_args=False)
        plain = not plates.lead and not plates.units
        require(
            plain, f"posterior of {name}", "a Dirichlet, for particles in a plate or units", str(q)
        )
        return q

    def _draw_rest(self, tokens: Tensor, targets: Tensor | None, plates: Plates) -> dict[str, Any]:
        """The sites of `rest`, drawn."""
        if self.rest is None:
            return {}
        require(
            not plates.lead,
            "particles",
            "one after another, where weights are random: the network draws them once a pass",
            f"plates of {tuple(plates.lead)} outside",
            "vectorize_particles=False, Predictive(parallel=False)",
        )
        with poutine.trace() as drawn:
            self.rest(tokens, targets)
        return {name: site for name, site in drawn.trace.nodes.items() if site["type"] == "sample"}


class _Others(Messenger):
    """Keeps the sites of a network that are no routes to this pass.

    They stand at the values that `rest` has drawn.
    """

    def __init__(self, drawn: dict[str, Any]):
        super().__init__()
        self.drawn, self.met = drawn, False

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_route_site(msg["name"]) or site_is_subsample(msg):
            return
        self.met = msg["stop"] = True
        if not msg["is_observed"]:
            require(
                msg["name"] in self.drawn,
                "guide",
                f"a posterior of the model's latent {msg['name']}",
                sorted(self.drawn) or "routes alone",
                "RoutingGuide(model, controller, rest=a guide of it, an AutoNormal for one)",
            )
            msg["value"], msg["done"] = self.drawn[msg["name"]]["value"], True
