"""The dial of a fit against what no token moves: every expert alone, and the layout it leans to.

All on the same windows, so that differences are paired. What is chosen (each layer's favourite, the
point of the dial that a rival is held against, the rival that is named) is chosen on every second
window and read on the others, so that no choice flatters what it is read on.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.measures.bootstrap import LEVEL, clustered
from bayes_router.routing.policy import Argmax, Budget
from bayes_router.training.executed import Executed, execute
from bayes_router.training.guarantee import Single
from bayes_router.types import RoutingMode

PRICES = (-30.0, -8.0, -1.0, 0.0, 3.0, 8.0, 30.0)
"""Nats per unit of cost, at which the dial is read; 0 is the fit as it is."""
DIAL, STATIC = "dial", "static"


class _Laid:
    """A model every token of which takes the expert of its layer, whatever the policy."""

    def __init__(self, model: Any, experts: Tensor):
        self.model, self.experts = model, experts
        self.training, self.policy = model.training, model.policy

    def parameters(self) -> Any:
        return self.model.parameters()

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def __call__(self, tokens: Tensor, mode: RoutingMode) -> Any:
        forced = self.experts[:, None, None].expand(-1, *tokens.shape).contiguous()
        return self.model(tokens, mode, force=forced)


class _Reading(NamedTuple):
    """A point of the dial or a rival, read where things are chosen, and where they are read."""

    name: str
    kind: str
    chosen_on: Executed
    read_on: Executed


def against_static(
    model: Any, batches: Sequence[Batch], cost: Tensor, experts: Sequence[str]
) -> pd.DataFrame:
    """One row a point of the dial and a static rival, read on every second window.

    Columns: name, kind, cost (of the executed routes, full = 1), nll (HARD, nats per token), low
    and high (its interval over windows), and of a static rival `behind`: how many nats it lies
    above the best point of the dial that costs no more, with behind_low and behind_high; empty
    where no point of the dial is as cheap. That point is the best of the other windows, and
    `behind_there` is how many nats it is there.

    Args:
        model: the fitted model, or a patched one.
        batches: windows, one a batch; at least four.
        cost: [E], or [L, E].
        experts: their names.

    Raises:
        ValueError: fewer than four windows.
    """
    require(len(batches) >= 4, "windows", "at least four", len(batches), "read a longer text")
    per_expert = cost if cost.dim() == 1 else cost.mean(0)
    halves = batches[::2], batches[1::2]

    def read(name: str, kind: str, policy: Any, price: float = 0.0, of: Any = model) -> _Reading:
        both = (execute(of, half, cost, RoutingMode.HARD, policy, price).reading for half in halves)
        return _Reading(name, kind, *both)

    found = [
        read("fit" if price == 0 else f"price {price:+g}", DIAL, _dialled(per_expert, price), price)
        for price in PRICES
    ]
    layout = found[PRICES.index(0.0)].chosen_on.load.argmax(-1)
    found += [read(f"all on {name}", STATIC, Single(i)) for i, name in enumerate(experts)]
    names = ": " + ", ".join(experts[int(index)] for index in layout) if len(layout) <= 8 else ""
    laid = _Laid(model, layout)
    found.append(read(f"each layer on its favourite{names}", STATIC, Argmax(), of=laid))
    dial = [one for one in found if one.kind == DIAL]
    return pd.DataFrame([_row(one, dial) for one in found])


def _dialled(cost: Tensor, price: float) -> Any:
    return Budget(tuple(cost.tolist()), price)


def _row(one: _Reading, dial: Sequence[_Reading]) -> dict[str, Any]:
    reading = one.read_on
    row: dict[str, Any] = {"name": one.name, "kind": one.kind, "cost": reading.cost}
    loss, scored = reading.window_nll.numpy(), reading.window_scored.numpy()
    windows = range(len(loss))
    alone = clustered(lambda i: loss[i].sum() / scored[i].sum(), windows)
    row |= {"nll": reading.nll, "low": alone.low, "high": alone.high, "windows": len(loss)}
    if one.kind == STATIC:
        row |= dict.fromkeys(("behind", "behind_low", "behind_high", "behind_there"), math.nan)
        cheaper = [ours for ours in dial if ours.chosen_on.cost <= one.chosen_on.cost + 1e-6]
        if cheaper:
            best = min(cheaper, key=lambda ours: ours.chosen_on.nll)
            lost = loss - best.read_on.window_nll.numpy()
            gap = clustered(lambda i: lost[i].sum() / scored[i].sum(), windows)
            row |= {"behind": gap.value, "behind_low": gap.low, "behind_high": gap.high}
            row["behind_there"] = one.chosen_on.nll - best.chosen_on.nll
            row["against"] = f"dial at {best.read_on.cost:.3f}"
    return row


def sentence(table: pd.DataFrame) -> tuple[bool, str]:
    """Whether the strongest static rival is no better beyond its interval, and what is said of it.

    The strongest is that of the windows on which things are chosen.
    """
    rivals = table[table["kind"] == STATIC]
    alone = int(rivals["behind"].isna().sum())
    cheaper = f", {alone} of them cheaper than any point of the dial" if alone else ""
    windows = int(table["windows"].iloc[0])
    count = f"of {len(rivals)} static rivals{cheaper}"
    rivals = rivals.dropna(subset=["behind"])
    if not len(rivals):
        return True, f"{count}, none can be held against a point that costs no more."
    one = rivals.sort_values("behind_there").iloc[0]
    gap = f"{LEVEL:.0%} {one['behind_low']:+.3f} to {one['behind_high']:+.3f}"
    return bool(one["behind_high"] >= 0), (
        f"{count}, the strongest, '{one['name']}', loses {one['behind']:+.3f} nats ({gap}, n = "
        f"{windows} windows) over the best point of the dial that costs no more; both were chosen "
        f"on other windows."
    )
