"""Names and plates of the program: where a site lies, and how its value lies in memory, said once.

| site        | value                              | plates (dim)                                  |
|-------------|------------------------------------|-----------------------------------------------|
| `route_<l>` | [B, T, E], [R, B, T, E] with R > 1 | batch (-2), token (-1); unit (-3) where R > 1 |
| `targets`   | [B, T], [B, 1] for one a row       | batch (-2), token (-1) where each has one     |

R counts the routing units of a layer, `network.num_units`. Networks get weights [B, T, R, E], and
where R = 1 [B, T, E]: one route for all heads.
"""

from contextlib import ExitStack

import pyro
import torch
from pyro.poutine.runtime import get_plates
from torch import Tensor

from bayes_router.checks import require

TARGETS = "targets"
PREFIX = "route_"


def route_site(layer: int) -> str:
    """Name of the latent route of a layer in Pyro traces."""
    return f"{PREFIX}{layer}"


def is_route_site(name: str) -> bool:
    """Whether a site is the route of a layer."""
    return name.startswith(PREFIX) and name[len(PREFIX) :].isdigit()


class Plates:
    """The plates of one pass over tokens [B, T], and the particles that stand outside of them.

    Particles of a vectorised estimator are rows of a larger batch to the network: `lead` holds the
    sizes of the plates outside, and `rows` = prod(lead) * B.

    Args:
        tokens: int64 [B, T].
        units: R.
    """

    def __init__(self, tokens: Tensor, units: int):
        whole = tokens.dim() == 2 and tokens.numel() > 0
        require(whole, "tokens", "shape [B, T], one token or more", tuple(tokens.shape))
        self.B, self.T = tokens.shape
        self.units = (units,) if units > 1 else ()
        depth = 2 + len(self.units)
        outside = {f.dim: f.size for f in get_plates() if f.vectorized}
        dims = range(min(outside, default=0), -depth)
        self.lead = torch.Size(outside.get(dim, 1) for dim in dims)
        self.rows = self.lead.numel() * self.B
        self._unit = [pyro.plate("unit", units, dim=-3)] if self.units else []
        self._batch = pyro.plate("batch", self.B, dim=-2)
        self._token = pyro.plate("token", self.T, dim=-1)

    @property
    def route_shape(self) -> torch.Size:
        """Batch shape of a route site, particles excluded."""
        return torch.Size((*self.units, self.B, self.T))

    def routes(self) -> ExitStack:
        """The plates around a route site."""
        return _inside(*self._unit, self._batch, self._token)

    def targets(self, per_token: bool) -> ExitStack:
        """The plates around the targets: one a token, or one a row."""
        return _inside(self._batch, *([self._token] if per_token else []))

    def repeat(self, tokens: Tensor) -> Tensor:
        """Tokens for the network, [rows, T]: every particle reads the same."""
        return (
            tokens.expand(*self.lead, self.B, self.T).reshape(-1, self.T) if self.lead else tokens
        )

    def split(self, output: Tensor) -> Tensor:
        """What the network says, [rows, ...], as [*lead, B, ...].

        Particles become dimensions of their own.
        """
        ones = (1,) * len(self.units)
        return output.reshape(*self.lead, *ones, self.B, *output.shape[1:]) if self.lead else output

    def to_site(self, weights: Tensor) -> Tensor:
        """Routes of a network, [rows, T, (R,) E], as a site holds them: [*lead, (R,) B, T, E]."""
        whole = weights.reshape(*self.lead, self.B, self.T, *self.units, weights.shape[-1])
        return whole.movedim(-2, -4) if self.units else whole

    def from_site(self, value: Tensor) -> Tensor:
        """Of a route site, [*lead, (R,) B, T, E] or what broadcasts to it, as the network wants it.

        [rows, T, (R,) E].
        """
        whole = value.expand(*self.lead, *self.route_shape, value.shape[-1])
        whole = whole.movedim(-4, -2) if self.units else whole
        return whole.reshape(self.rows, self.T, *self.units, value.shape[-1])


def of_site(value: Tensor, units: int) -> Tensor:
    """Of a route site, [..., (R,) B, T, E], as networks and results have it: [..., B, T, R, E]."""
    return value.movedim(-4, -2) if units > 1 else value.unsqueeze(-2)


def with_unit(value: Tensor, units: int) -> Tensor:
    """What a controller says of tokens, [B, T, (R,) E], with R also where it is 1: [B, T, R, E]."""
    return value.unsqueeze(-2) if units == 1 and value.dim() == 3 else value


def to_network(weights: Tensor, units: int) -> Tensor:
    """Weights [B, T, R, E] as the program hands them to a network: [B, T, E] where R = 1."""
    return weights.squeeze(-2) if units == 1 and weights.dim() == 4 else weights


def _inside(*plates: pyro.plate) -> ExitStack:
    """All of these plates entered."""
    stack = ExitStack()
    for plate in plates:
        stack.enter_context(plate)
    return stack
