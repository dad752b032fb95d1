"""The collapses of a router, told apart.

All tokens on one expert, one route for all tokens, an expert that nobody takes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional as F

from bayes_router.checks import require
from bayes_router.diagnostics.measures.bootstrap import LEVEL, clustered
from bayes_router.diagnostics.measures.uncertainty import SURE_WEIGHT
from bayes_router.diagnostics.measures.verdict import Severity, Verdict, merged
from bayes_router.diagnostics.reading import Reading
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.information import ByToken
from bayes_router.routing.posterior import categorical_entropy, posterior_mean
from bayes_router.routing.tilt import tilted_moments


class Collapse(Enum):
    """What can go wrong in a layer; the values are topics of verdicts."""

    ROUTING = "routing collapse"  # nearly all tokens take one expert
    POSTERIOR = "posterior collapse"  # the same posterior for every token
    DEAD_EXPERT = "dead expert"  # an expert that no token takes


@dataclass(frozen=True)
class CollapseThresholds:
    """Where a verdict begins.

    Attributes:
        routing_load: share of tokens on one expert above which routing has collapsed.
        posterior_information: nats between token and route below which all tokens share one
            posterior.
        prior_kl: nats per token below which that posterior is the prior itself.
        dead_load: share of tokens below which an expert is dead.
    """

    routing_load: float = 0.99
    posterior_information: float = 1e-3
    prior_kl: float = 0.01
    dead_load: float = 1e-3

    def __post_init__(self) -> None:
        """Check the fields."""
        require(
            0.5 < self.routing_load <= 1,
            "routing_load",
            "a share above one half",
            self.routing_load,
        )
        require(0 <= self.dead_load < 1, "dead_load", "a share", self.dead_load)
        for name in ("posterior_information", "prior_kl"):
            require(getattr(self, name) >= 0, name, "0 or more nats", getattr(self, name))


class LayerState(NamedTuple):
    """What the verdicts on a layer read.

    A row of `CollapseSummary.layers`, or of the log of a run.
    """

    load: Sequence[float]  # [E], HARD
    route_information: float  # nats
    kl: float  # nats per token
    context_information: float = math.nan  # nats of it that the token at hand does not tell


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
        self._entropy, self._kl, self._sure = nothing, nothing, nothing  # [L, R]
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
        self._kl = (
            self._kl
            + torch.stack(
                [kl_to_prior(self.program, i, part).sum(0) for i, part in enumerate(q)]
            ).cpu()
        )
        self.tokens += q.shape[1]
        return self

    def layers(self) -> pd.DataFrame:
        """One row a layer: shares in [0, 1], information and KL in nats.

        `prior_distance` is the total variation between the mean route and that of the prior. Of
        several units the KL is summed, `largest_load` is the mean of each unit's, and everything
        else a mean too.
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
        adds, in nats, and the mean total concentration of its posteriors: the evidence, in
        observations, that its routes rest on.
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


def kl_to_prior(program: RoutingModel, layer: int, concentration: Tensor) -> Tensor:
    """KL(Dirichlet(concentration [..., E]) || prior of the layer), nats.

    Exact, the tilt included.
    """
    q = Dirichlet(concentration, validate_args=False)
    return kl_divergence(q, program.token_prior(layer)).double()


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


def layer_verdicts(
    state: LayerState,
    experts: Sequence[str],
    layer: int,
    thresholds: CollapseThresholds | None = None,
) -> list[Verdict]:
    """Every collapse that a layer shows, in words."""
    if len(experts) < 2:
        return []
    t, found = thresholds or CollapseThresholds(), []
    load = np.asarray(state.load)
    favourite = experts[int(load.argmax())]
    routing = load.max() > t.routing_load
    if routing:
        found.append(
            Verdict(
                Collapse.ROUTING.value,
                Severity.WARNING,
                f"{load.max():.1%} of the tokens take {favourite} (threshold "
                f"{t.routing_load:.0%}): the layer is a static one.",
                "another prior mean for the layer (prior.layer_mean), a higher prior.temperature "
                "or a lower prior.price if the "
                f"favourite is the cheapest; or leave {favourite} there for good, if that is what "
                f"the text wants.",
                (layer,),
            )
        )
    if state.route_information < t.posterior_information:
        found.append(_posterior_collapse(state, layer, t))
    dead = [name for name, share in zip(experts, load, strict=True) if share < t.dead_load]
    if dead and not routing:
        found.append(
            Verdict(
                Collapse.DEAD_EXPERT.value,
                Severity.NOTE,
                f"{', '.join(dead)} taken by fewer than {t.dead_load:.1%} of the tokens.",
                f"a start that favours it (schedule.start_experts), a lower prior.price or a "
                f"higher prior.temperature; or drop "
                f"{' and '.join(dead)} from the layer if it is dead in every seed.",
                (layer,),
            )
        )
    return found


def _posterior_collapse(state: LayerState, layer: int, t: CollapseThresholds) -> Verdict:
    at_prior = state.kl < t.prior_kl
    where = (
        f"and equals the prior (KL {state.kl:.2g} nats, threshold {t.prior_kl:g})"
        if at_prior
        else f"though not the prior's (KL {state.kl:.2g} nats)"
    )
    return Verdict(
        Collapse.POSTERIOR.value,
        Severity.WARNING,
        f"every token has one posterior, {where}: route information {state.route_information:.2g} "
        f"nats{_of_it(state.context_information)} "
        f"(threshold {t.posterior_information:g}).",
        "a lower schedule.kl_weight; schedule.kl_warmup above 0 helps, a sparser prior alone does "
        "not."
        if at_prior
        else "a lower schedule.kl_weight where it is near 1; where it is small already, a higher "
        "train.controller_lr or longer "
        "training: the controller has not begun to read the hidden state.",
        (layer,),
    )


def _of_it(of_context: float) -> str:
    """What of the information is of the context, where that was read."""
    return "" if of_context != of_context else f", {of_context:.2g} of it of context"


def healthy(frame: pd.DataFrame, thresholds: CollapseThresholds | None = None) -> Verdict:
    """What is said of a run without a collapse."""
    t = thresholds or CollapseThresholds()
    least = frame.iloc[int(frame["route_information"].argmin())]
    return Verdict(
        "collapse",
        Severity.GOOD,
        f"none: the largest load of a layer is {frame['largest_load'].max():.1%} (threshold "
        f"{t.routing_load:.0%}), the least "
        f"route information {least['route_information']:.2g} nats"
        f"{_of_it(least['context_information'])} (threshold {t.posterior_information:g}).",
    )


def collapse_over_training(
    metrics: pd.DataFrame, experts: Sequence[str], thresholds: CollapseThresholds | None = None
) -> pd.DataFrame:
    """The same figures at every evaluation of a run.

    One row a step and layer, with the topics of its verdicts.

    Args:
        metrics: the content of metrics.csv.
        experts: names, as in the columns load_<layer>_<expert>.
        thresholds: of the verdicts.
    """
    column = f"load_0_{experts[0]}"
    require(
        column in metrics,
        "metrics",
        f"a column {column}, written at each evaluation",
        list(metrics.columns)[:8],
    )
    evaluated, rows = metrics.dropna(subset=[column]), []
    num_layers = sum(name.startswith("route_information_") for name in metrics.columns)
    for _, row in evaluated.iterrows():
        for layer in range(num_layers):
            load = np.array([row[f"load_{layer}_{name}"] for name in experts])
            of_context = row.get(f"context_information_{layer}", math.nan)
            state = LayerState(
                list(load), row[f"route_information_{layer}"], row[f"kl_{layer}"], of_context
            )
            rows.append(
                {
                    "step": int(row["step"]),
                    "layer": layer,
                    "effective_experts": float(
                        np.exp(-np.sum(load * np.log(np.maximum(load, 1e-300))))
                    ),
                    "largest_load": load.max(),
                    "route_information": state.route_information,
                    "context_information": state.context_information,
                    "kl": state.kl,
                    "collapse": ", ".join(
                        v.topic for v in layer_verdicts(state, experts, layer, thresholds)
                    ),
                }
            )
    return pd.DataFrame(rows)
