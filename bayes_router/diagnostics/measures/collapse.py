"""How far routes have collapsed: load, information and distance from the prior, over a text."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional as F

from bayes_router.checks import require
from bayes_router.diagnostics.measures.bootstrap import LEVEL, clustered
from bayes_router.diagnostics.measures.collapse_verdicts import (
    CollapseThresholds,
    LayerState,
    healthy,
    layer_verdicts,
)
from bayes_router.diagnostics.measures.uncertainty import SURE_WEIGHT
from bayes_router.diagnostics.measures.verdict import Verdict, merged
from bayes_router.diagnostics.reading import Reading
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.routing.information import ByToken
from bayes_router.routing.posterior import categorical_entropy, posterior_mean
from bayes_router.routing.tilt import tilted_moments


class CollapseSummary:
    """Load, information and distance from the prior of every layer and unit.

    They are sums, over a text of any length.

    Args:
        program: whose prior the posterior is compared with (tilted by cost where it is).
        experts: names of the E experts.
    """

    def __init__(self, program: RoutingModel, experts: Sequence[str]):
        self.program, self.experts = program, list(experts)
        self.tokens = 0
        nothing = torch.zeros((), dtype=torch.float64)
        self._load, self._mean = nothing, nothing  # [L, R, E]
        self._entropy, self._sure = nothing, nothing  # [L, R]
        self._kl, self._untilted = (
            nothing,
            nothing,
        )  # [L, R], to the prior with and without its tilt
        self._total = nothing  # [L, R], of the concentration
        self._by_token = ByToken()
        self._windows: list[Tensor] = []  # [L, R, E] loads of each window

    def add(self, reading: Reading) -> "CollapseSummary":
        """Take in a batch."""
        q = reading.concentration.detach().flatten(1, 2)  # [L, N, R, E]
        mean = posterior_mean(q.double().cpu())
        self._load = (
            self._load
            + F.one_hot(reading.hard_choice.flatten(1, 2), q.shape[-1]).double().sum(1).cpu()
        )
        taken = F.one_hot(reading.hard_choice, q.shape[-1]).double().mean(2)  # [L, B, R, E]
        self._windows += list(taken.cpu().unbind(1))
        self._mean = self._mean + mean.sum(1)
        self._by_token.add(reading.tokens, mean.movedim(1, -2))
        self._total = self._total + q.double().sum(-1).sum(1).cpu()
        self._entropy = self._entropy + categorical_entropy(mean).sum(1)
        self._sure = self._sure + (mean.amax(-1) > SURE_WEIGHT).double().sum(1)
        self._kl, self._untilted = (
            before
            + torch.stack(
                [kl_to_prior(self.program, i, part, tilted).sum(0) for i, part in enumerate(q)]
            ).cpu()
            for before, tilted in ((self._kl, True), (self._untilted, False))
        )
        self.tokens += q.shape[1]
        return self

    def layers(self) -> pd.DataFrame:
        """One row a layer: shares in [0, 1], information and KL in nats.

        `kl` is what the ELBO pays: with a price, mostly price times cost. `kl_untilted` is the
        distance from the prior without its tilt. `prior_distance` is the total variation between
        the mean route and that of the prior. Of several units both KL are summed, `largest_load` is
        the mean of each unit's, and everything else a mean too.
        """
        require(self.tokens > 0, "text", "at least one token", "an empty text", "read a text first")
        of_units, mean = self._load / self.tokens, self._mean / self.tokens
        load = of_units.mean(1)
        frame = pd.DataFrame(load.numpy(), columns=[f"load {name}" for name in self.experts])
        frame["effective_experts"] = categorical_entropy(of_units).exp().mean(1).numpy()
        frame["largest_load"] = of_units.amax(-1).mean(1).numpy()
        frame["share_sure"] = (self._sure / self.tokens).mean(1).numpy()
        frame["route_information"] = self._information().mean(1).numpy()
        frame["context_information"] = self._of_context().mean(1).numpy()
        frame["kl"] = (self._kl / self.tokens).sum(1).numpy()
        frame["kl_untilted"] = (self._untilted / self.tokens).sum(1).numpy()
        frame["prior_distance"] = (
            (0.5 * (mean - prior_mean(self.program)).abs().sum(-1)).mean(1).numpy()
        )
        frame.index.name = "layer"
        return frame

    def _information(self) -> Tensor:
        """[L, R], nats."""
        mean = self._mean / self.tokens
        return (categorical_entropy(mean) - self._entropy / self.tokens).clamp_min(0)

    def _of_context(self) -> Tensor:
        """[L, R], nats of it that the token at hand does not tell; see `routing.information`."""
        return (self._by_token.entropy() - self._entropy / self.tokens).clamp_min(0)

    def units(self) -> pd.DataFrame:
        """One row a layer and unit.

        Its load on each expert, the largest, its route information and what of it the context
        adds, in nats, the mean total concentration of its posteriors (the evidence, in
        observations, that its routes rest on), and how far they are from the prior without its
        tilt, in nats per token.
        """
        require(self.tokens > 0, "text", "at least one token", "an empty text", "read a text first")
        load = self._load / self.tokens
        L, R, _ = load.shape
        frame = pd.DataFrame(
            load.flatten(0, 1).numpy(), columns=[f"load {name}" for name in self.experts]
        )
        frame.insert(0, "layer", np.repeat(np.arange(L), R))
        frame.insert(1, "unit", np.tile(np.arange(R), L))
        frame["largest_load"] = load.amax(-1).flatten().numpy()
        frame["route_information"] = self._information().flatten().numpy()
        frame["context_information"] = self._of_context().flatten().numpy()
        frame["total_concentration"] = (self._total / self.tokens).flatten().numpy()
        frame["kl_untilted"] = (self._untilted / self.tokens).flatten().numpy()
        return frame

    def verdicts(self, thresholds: CollapseThresholds | None = None) -> list[Verdict]:
        """What has collapsed; one GOOD verdict where nothing has."""
        frame = self.layers()
        found: list[Verdict] = []
        for layer in range(len(frame)):
            row = frame.iloc[layer]
            units = self._load[layer] / self.tokens  # [R, E]
            # a layer has collapsed where all of its units have
            widest = units[int(units.amax(-1).argmin())].tolist()
            information = row["route_information"], row["context_information"]
            state = LayerState(widest, information[0], row["kl"], information[1])
            found += layer_verdicts(state, self.experts, layer, thresholds)
        found = merged(found) or [healthy(frame, thresholds)]
        return [one._replace(basis=self._basis(one.layers)) for one in found]

    def _basis(self, layers: Sequence[int]) -> str:
        """How much was read, and the largest load of these layers with its interval."""
        count = f"n = {self.tokens:,} tokens in {len(self._windows)} windows"
        if len(self._windows) < 2:
            return count
        load = torch.stack(self._windows).mean(2).numpy()  # [windows, L, E]
        of = load[:, list(layers)] if layers else load
        layer, expert = np.unravel_index(of.mean(0).argmax(), of.shape[1:])
        share = of[:, layer, expert]
        found = clustered(lambda rows: float(share[rows].mean()), range(len(share)))
        where = (layers or range(load.shape[1]))[int(layer)]
        return (
            f"{count}; {self.experts[int(expert)]} in layer {where} takes {found.value:.1%}, "
            f"{LEVEL:.0%} {found.low:.1%} to {found.high:.1%}"
        )


def kl_to_prior(
    program: RoutingModel, layer: int, concentration: Tensor, tilted: bool = True
) -> Tensor:
    """KL(Dirichlet(concentration [..., E]) || prior of the layer), nats.

    Exact, the tilt included; or to the Dirichlet that the price tilts.
    """
    q, prior = Dirichlet(concentration, validate_args=False), program.token_prior(layer)
    if not tilted and isinstance(prior, TiltedDirichlet):
        prior = prior.base
    return kl_divergence(q, prior).double()


def prior_mean(program: RoutingModel) -> Tensor:
    """Mean route of each layer and unit under the prior, the tilt included, [L, R or 1, E]."""
    concentration, costs = program.concentration.double().cpu(), program.cost_ratio.double().cpu()
    concentration = concentration if concentration.dim() == 3 else concentration[:, None]
    if program.price == 0:
        return posterior_mean(concentration)
    return tilted_moments(
        concentration, program.price * (costs[:, None] if costs.dim() == 2 else costs)
    ).mean


def summarise_collapse(
    readings: Iterable[Reading], program: RoutingModel, experts: Sequence[str]
) -> CollapseSummary:
    """Read a text to its end; ValueError if there is none."""
    summary = CollapseSummary(program, experts)
    for reading in readings:
        summary.add(reading)
    require(summary.tokens > 0, "text", "at least one token", "an empty text", "read a text first")
    return summary
