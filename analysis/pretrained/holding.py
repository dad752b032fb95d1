"""What four kinds of text cost under a price set on one, and where the budget is held as they go.

    python -m analysis.pretrained.holding read MODEL TOKENS.npz PATCH --results HOLDING.csv
    python -m analysis.pretrained.holding table [HOLDING.csv]

The price is set on novels (`set_budget`); then every kind is read window after window, at that
price and under `router.holding`. `cost` is the executed one by the costs of `set_budget`, `keys` by
the keys that each position reads.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.pretrained.again import command
from analysis.pretrained.contenders import executed_cost
from analysis.pretrained.table import KINDS
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.routing.cost import counted

RESULTS = Path(__file__).parents[1] / "results" / "pretrained_holding.csv"


@torch.no_grad()
def windows(
    router: RoutedPretrained,
    texts: dict[str, TokenStream],
    context: int,
    budget: float,
    number: int,
) -> Iterator[dict[str, Any]]:
    """A row a kind, way and window."""
    router.set_budget(budget, texts["novels"], context=context, limit=2 * 8192)
    price, count = router.policy, counted(router.layer_cost)
    for kind in KINDS:
        ids = texts[kind].tokens[: number * context].long().view(number, 1, context)
        for way in ("at one price", "held"):
            router.policy = price
            with router.holding(budget) if way == "held" else nullcontext():
                for i, window in enumerate(ids):
                    router.logits(window.to(router.device), use_cache=False, logits_to_keep=1)
                    last = router.last
                    routes = torch.stack([last.executed[n][0] for n in range(len(router.layers))])
                    row = {"context": context, "budget": budget, "text": kind, "way": way}
                    row |= {"piece": i, "cost": count(routes)}
                    yield row | {"keys": executed_cost(router, routes)}
    router.policy = price


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A line a window, length, budget and way: what each kind costs over all windows."""
    keys = ["window", "context", "budget", "way"]
    cost = frame.groupby([*keys, "text"])["cost"].mean().unstack()
    cost["farthest"] = cost.sub(cost.index.get_level_values("budget"), axis=0).abs().max(axis=1)
    cost["windows"] = frame.groupby(keys)["piece"].nunique()
    return cost.reset_index().round(3)


def main() -> None:
    """Read, or print."""
    command(
        __doc__,
        RESULTS,
        lambda router, texts, args, budget: windows(
            router, texts, args.context, budget, args.windows
        ),
        summary,
        lambda read: read.add_argument("--windows", type=int, default=24, help="of each kind"),
        "0.3,0.4",
    )


if __name__ == "__main__":
    sys.exit(main())
