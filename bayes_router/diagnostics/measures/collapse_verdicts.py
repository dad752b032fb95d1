"""The collapses of a router, told apart, in words.

All tokens on one expert, one route for all tokens, an expert that nobody takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import pandas as pd

from bayes_router.checks import require
from bayes_router.diagnostics.measures.verdict import Severity, Verdict


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
