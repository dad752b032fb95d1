"""The meta-controller: from a token's hidden state to the concentration of its route.

One small network a layer.

It reads only the token's own hidden state, which a prefix determines: no future, no sequence
length.
"""

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet
from torch.nn import functional as F

from bayes_router.routing.evidence import Evidence
from bayes_router.routing.posterior import inverse_softplus, posterior
from bayes_router.routing.risk import Risk


class LayerController(nn.Module):
    """hidden [..., D] -> raw [..., R, E].

    Linear, or one hidden layer of SiLU neurons, which all routing units share.

    The last layer starts at zero but for its bias, so that every posterior starts at the same
    chosen concentration.
    """

    def __init__(self, d_model: int, num_experts: int, hidden: int, num_units: int = 1):
        super().__init__()
        self.num_units = num_units
        self.hidden = nn.Linear(d_model, hidden) if hidden else None
        self.out = nn.Linear(hidden or d_model, num_units * num_experts)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, units: Tensor | None = None) -> Tensor:
        """See the class; of some units alone [..., n, E] where `units`, int64 [n], names them."""
        read = hidden if self.hidden is None else F.silu(self.hidden(hidden))
        if units is None:
            raw: Tensor = self.out(read)
            return raw.unflatten(-1, (self.num_units, -1))
        weight, bias = (
            x.unflatten(0, (self.num_units, -1)).index_select(0, units)
            for x in (self.out.weight, self.out.bias)
        )
        return F.linear(read, weight.flatten(0, 1), bias.flatten()).unflatten(-1, (len(units), -1))


class MetaController(nn.Module):
    """q(route_l[b, t, r] | h_l[b, t]), a Dirichlet for layer l and unit r.

    Its concentration is floor + softplus(controller_l(h_l[b, t])[r]).

    Attributes:
        evidence: the density of what it read in its fit, where the fit kept one; no part of the
            state dict.
        risk: the estimate of what routing loses, where one was fitted; idem.
    """

    def __init__(
        self,
        d_model: int,
        num_layers: int,
        num_experts: int,
        hidden: int = 64,
        floor: float = 0.01,
        num_units: int = 1,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            LayerController(d_model, num_experts, hidden, num_units) for _ in range(num_layers)
        )
        self.floor = floor
        self.evidence: Evidence | None = None
        self.risk: Risk | None = None

    def posterior(self, layer: int, hidden: Tensor, units: Tensor | None = None) -> Dirichlet:
        """The posterior of a layer's routes, batch shape [B, T, R], for hidden [B, T, D].

        float32 whatever autocast says.

        Of some units alone where `units`, int64 [n], names them: only these are computed.
        """
        raw = self.layers[layer](hidden) if units is None else self.layers[layer](hidden, units)
        return posterior(raw, self.floor)

    @torch.no_grad()
    def start_at(self, concentration: Tensor) -> None:
        """Set every posterior to `concentration`, [L, E] or [L, R, E], whatever the hidden state.

        Where training starts.
        """
        for controller, target in zip(self.layers, concentration, strict=True):
            assert isinstance(controller, LayerController)
            above = (target - self.floor).clamp_min(1e-3).double()
            controller.out.weight.zero_()
            raw = inverse_softplus(above)
            controller.out.bias.copy_(raw.expand(controller.num_units, -1).flatten())
