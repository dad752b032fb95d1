"""What a pass of a patched model says of how it was routed: its KL, its statistics."""

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import require
from bayes_router.integrations.patch.deciding import Deciding
from bayes_router.integrations.patch.passes import Pass
from bayes_router.integrations.patch.settings import FitRecord
from bayes_router.routing.by_layer import aligned
from bayes_router.routing.prior import ComputeAwarePrior
from bayes_router.routing.statistics import RoutingStatistics, routing_statistics
from bayes_router.routing.tilt import tilted_kl, tilted_moments


class Accounted(Deciding):
    """A routed model that can be asked how a pass was routed."""

    prior: ComputeAwarePrior
    layer_cost: Tensor
    full_up_to: int
    fitted: FitRecord | None = None

    def note(self, index: int, q: Dirichlet, executed: Tensor) -> None:
        """Keep how a layer routed the pass under way."""
        last = self.here.slot.last
        last.concentration[index], last.executed[index] = q.concentration, executed

    @property
    def _executed(self) -> dict[int, Tensor]:
        """`last.executed`, by the name that programs of before read."""
        return self.last.executed

    def kl(self, of: Pass | None = None) -> Tensor:
        """KL(posterior || prior) of a pass, nats per real token, summed over layers and units.

        task loss + weight * kl is a negative ELBO.

        The prior is tilted by its price: KL(q || Dirichlet) + price * cost . E_q[route] + log Z, a
        layer's own costs. Padding is no token. The last pass of this thread by default, which has a
        gradient until the pass went backward: a pass of which more is wanted is kept by holding
        `last`.

        Raises:
            ValueError: nothing was routed in that pass, all of it was forced, or units are frozen.
        """
        self.require_thawed("kl")
        prior, tilt = aligned(self.prior.concentration, self.price * self.prior.of_layers())
        log_z = tilted_moments(prior, tilt).log_normaliser  # [L], or [L, R]
        routed, terms = self.routed(of), []
        routed.kl_taken = True
        for layer, q in sorted(routed.concentration.items()):
            # over units
            of_token = tilted_kl(q, prior[layer].to(q), tilt[layer], log_z[layer].to(q)).sum(-1)
            terms.append(routed.mean(layer, of_token))
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @property
    def price(self) -> float:
        """The price of the prior, nats per unit of cost: where the fit ended, or as patched."""
        return self.settings.prior.price if self.fitted is None else self.fitted.price

    def statistics(
        self, of: Pass | None = None, tokens: Tensor | None = None
    ) -> list[RoutingStatistics]:
        """How each layer routed the real tokens of a pass, by default the last of this thread.

        With the ids of its `tokens`, [B, T], also what of the information is of the context.

        Raises:
            ValueError: as `kl`; or `tokens` are not those of the pass.
        """
        routed = self.routed(of).detached()
        shape = next(iter(routed.concentration.values())).shape[:2]
        fits = tokens is None or (isinstance(tokens, Tensor) and tokens.shape == shape)
        got = getattr(tokens, "shape", tokens)
        require(fits, "tokens", f"the ids of that pass, a tensor {list(shape)}", got)
        return [
            routing_statistics(
                routed.tokens(i, q),
                routed.tokens(i, routed.executed[i]),
                self.layer_cost[i].to(q.device),
                self.experts,
                None if tokens is None else routed.tokens(i, tokens.to(q.device)),
            )
            for i, q in sorted(routed.concentration.items())
        ]

    def routed(self, of: Pass | None = None) -> Pass:
        """A pass, by default the last of this thread, of whose layers each has a posterior.

        Raises:
            ValueError: nothing was routed in that pass, or all of it was forced.
        """
        routed = self.last if of is None else of
        require(
            not routed.on_full,
            "last pass",
            f"a text of more than {self.full_up_to} tokens, or router.full_up_to = 0",
            "a shorter one: routing would not save time, and every token took full",
        )
        unrouted = [one.name for i, one in enumerate(self.found) if i not in routed.concentration]
        require(
            not unrouted,
            "last pass",
            f"posteriors of all {len(self.layers)} layers",
            f"none of {', '.join(unrouted)}",
            "run the model once, not forced; layers that never route (cross-attention) are left "
            "out by patch(layers=...)",
        )
        return routed
