"""The amortised posterior over routes, as a Pyro guide that runs inside the model."""

from collections.abc import Callable

import pyro.distributions as dist
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_router.inference.model import Named, RoutingModel
from bayes_router.routing.controller import MetaController
from bayes_router.types import hidden_site


class RoutingGuide(GuideMessenger, Named):
    """q(routes | tokens) = prod_l Dirichlet(route_l; controller_l(hidden_l)).

    A guide messenger runs inside the model, so that a training step is one forward pass: at each route site of the model it
    answers with the posterior given the hidden state there. It never sees the targets: at inference there are none.

    TraceMeanField_ELBO's analytic KL is exact here although the posterior of a layer depends on draws of earlier layers:
    model and guide have the same dependency structure, the condition that its docstring states.
    """

    upstream_value: Callable[[str], Tensor]  # of GuideMessenger: a site of the model that has run already
    get_traces: Callable[[], tuple[Trace, Trace]]  # of GuideMessenger: (model trace, guide trace)

    def __init__(self, model: RoutingModel, controller: MetaController):
        Named.__init__(self)
        GuideMessenger.__init__(self, model)
        self.controller = controller

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Run model and guide together; the values of all sites."""
        self.show_parameters(self.controller)
        return GuideMessenger.__call__(self, *args, **kwargs)

    def get_posterior(self, name: str, prior: dist.TorchDistribution) -> dist.TorchDistribution:
        """The posterior at a route site; any other latent (unobserved targets) keeps its prior."""
        prefix, _, layer = name.partition("_")
        if prefix != "route":
            return prior
        hidden = self.upstream_value(hidden_site(int(layer)))
        controller: MetaController = self.controller
        q = controller.posterior(int(layer), hidden)
        return dist.Dirichlet(q.concentration, validate_args=False)
