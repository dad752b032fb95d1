"""What freezing frees: the memory of the cache against the loss, at several shares.

    python -m analysis.pretrained.freezing read MODEL TOKENS.npz PATCH --results FREEZING.csv
    python -m analysis.pretrained.freezing table [FREEZING.csv]

Under the policy that spends the budget on novels, units are frozen that send all but a share of the
tokens to one expert (`router.freeze`), chosen on windows of all four kinds of text; what that costs
is read on as many others. Bytes are those of the cache of transformers behind one window, measured.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.pretrained.again import command
from analysis.pretrained.reading import Reader
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.routing.policy import Budget

RESULTS = Path(__file__).parents[1] / "results" / "pretrained_freezing.csv"
SHARES = (0.01, 0.03, 0.04, 0.05, 0.1)


def mixed(texts: dict[str, TokenStream], context: int, each: int) -> Tensor:
    """`each` windows of every text, the texts by turns, from all over them."""
    room = {name: len(stream) // each for name, stream in texts.items()}
    short = [name for name, length in room.items() if length < context]
    if short:
        raise ValueError(f"texts: expected {each} windows of {context} tokens; {short} are shorter")
    parts = [
        stream.tokens[i * room[name] : i * room[name] + context]
        for i in range(each)
        for name, stream in texts.items()
    ]
    return torch.cat([*parts, parts[0][:1]]).long()


def freeze(
    router: RoutedPretrained,
    texts: dict[str, TokenStream],
    context: int,
    each: int,
    budget: float,
    shares: tuple[float, ...] = SHARES,
) -> Iterator[dict[str, Any]]:
    """A row a share."""
    dial, _ = Reader(router).meet(texts["novels"], context, budget)
    router.policy = Budget(tuple(router.cost_ratio.tolist()), dial)
    tokens = mixed(texts, context, each)
    for share in shares:
        found = router.freeze(tokens, share=share, context=context, limit=len(tokens))
        row = {"budget": budget, "share": share, "frozen": found.frozen, "units": found.units}
        row |= {"short": found.short, "key_heads": found.key_heads, "context": context}
        row |= {"bytes_before": found.bytes_before, "bytes": found.bytes}
        row |= {"lost": found.lost, "error": found.error, "tokens": found.tokens}
        yield row | {"cost_before": found.cost_before, "cost": found.cost}
        router.thaw()


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A line a kind of fit, budget and share, means over seeds.

    `SE` is over the windows of one seed, the mean.
    """
    frame = frame.assign(
        freed=100 * (1 - frame["bytes"] / frame["bytes_before"]),
        lost=100 * frame["lost"],
        SE=100 * frame["error"],
        frozen=100 * frame["frozen"] / frame["units"],
    )
    keys = ["fit", "window", "context", "budget", "share"]
    shown = frame.groupby(keys)[["frozen", "freed", "lost", "SE", "cost_before", "cost"]].mean()
    shown.insert(0, "seeds", frame.groupby(keys)["seed"].nunique())
    named = {"frozen": "units frozen, %", "freed": "bytes freed, %", "lost": "perplexity lost, %"}
    return shown.reset_index().rename(columns=named).round(3)


def main() -> None:
    """Read, or print."""
    command(__doc__, RESULTS, _rows, summary, _options, "0.3")


def _options(read: argparse.ArgumentParser) -> None:
    read.add_argument("--seed", type=int, default=0, help="of the fit, for the rows")
    read.add_argument("--fit", help="what it observed, for the rows; default PATCH")
    read.add_argument("--each", type=int, default=8, help="windows of each text, half to choose")


def _rows(
    router: RoutedPretrained, texts: dict[str, TokenStream], args: argparse.Namespace, budget: float
) -> Iterator[dict[str, Any]]:
    for row in freeze(router, texts, args.context, args.each, budget):
        yield {"fit": args.fit or args.patch, "seed": args.seed} | row


if __name__ == "__main__":
    sys.exit(main())
