"""The dial of a fit against what no token moves: every expert alone, and the layout it leans to.

All on the same windows, so that differences are paired.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

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


def against_static(
    model: Any, batches: Sequence[Batch], cost: Tensor, experts: Sequence[str]
) -> pd.DataFrame:
    """One row a point of the dial and a static rival.

    Columns: name, kind, cost (of the executed routes, full = 1), nll (HARD, nats per token), low
    and high (its interval over windows), and of a static rival `behind`: how many nats it lies
    above the best point of the dial that costs no more, with behind_low and behind_high; empty
    where no point of the dial is as cheap.

    Args:
        model: the fitted model, or a patched one.
        batches: windows, one a batch.
        cost: [E], or [L, E].
        experts: their names.
    """
    per_expert = cost if cost.dim() == 1 else cost.mean(0)
    with torch.no_grad():
        ours = [
            execute(model, batches, cost, RoutingMode.HARD, _dialled(per_expert, price), price)
            for price in PRICES
        ]
    usual = ours[PRICES.index(0.0)].reading
    found = [
        ("fit" if price == 0 else f"price {price:+g}", DIAL, one.reading)
        for price, one in zip(PRICES, ours, strict=True)
    ]
    for index, name in enumerate(experts):
        alone = execute(model, batches, cost, RoutingMode.HARD, Single(index), 0.0).reading
        found.append((f"all on {name}", STATIC, alone))
    layout = usual.load.argmax(-1)
    names = ": " + ", ".join(experts[int(index)] for index in layout) if len(layout) <= 8 else ""
    laid: Any = _Laid(model, layout)
    leaning = execute(laid, batches, cost, RoutingMode.HARD, Argmax(), 0.0).reading
    found.append((f"each layer on its favourite{names}", STATIC, leaning))
    dial = [reading for _, kind, reading in found if kind == DIAL]
    return pd.DataFrame([_row(name, kind, reading, dial) for name, kind, reading in found])


def _dialled(cost: Tensor, price: float) -> Any:
    return Budget(tuple(cost.tolist()), price)


def _row(name: str, kind: str, reading: Executed, dial: Sequence[Executed]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "kind": kind, "cost": reading.cost, "nll": reading.nll}
    loss, scored = reading.window_nll.numpy(), reading.window_scored.numpy()
    windows = range(len(loss))
    one = clustered(lambda i: loss[i].sum() / scored[i].sum(), windows)
    row |= {"low": one.low, "high": one.high, "windows": len(loss)}
    if kind == STATIC:
        row |= {"behind": math.nan, "behind_low": math.nan, "behind_high": math.nan}
        cheaper = [ours for ours in dial if ours.cost <= reading.cost + 1e-6]
        if cheaper:
            best = min(cheaper, key=lambda ours: ours.nll)
            lost = loss - best.window_nll.numpy()
            gap = clustered(lambda i: lost[i].sum() / scored[i].sum(), windows)
            row |= {"behind": gap.value, "behind_low": gap.low, "behind_high": gap.high}
            row["against"] = f"dial at {best.cost:.3f}"
    return row


def sentence(table: pd.DataFrame) -> tuple[bool, str]:
    """Whether no static rival is better beyond its interval, and what is said of them."""
    rivals = table[table["kind"] == STATIC]
    better = rivals[rivals["behind_high"] < 0]
    alone = int(rivals["behind"].isna().sum())
    cheaper = f", {alone} of them cheaper than any point of the dial" if alone else ""
    count = f"{len(rivals)} static rivals on {int(table['windows'].iloc[0])} windows{cheaper}"
    if len(better):
        worst = better.sort_values("behind").iloc[0]
        return False, (
            f"of {count}, {len(better)} lose less than the dial at no more cost; most "
            f"'{worst['name']}', by {-worst['behind']:.3f} nats ({LEVEL:.0%} "
            f"{-worst['behind_high']:.3f} to {-worst['behind_low']:.3f})."
        )
    return True, f"of {count}, none loses less than the dial at no more cost, beyond its interval."
