"""What freezing frees: the memory of the cache against the loss, at several shares.

    python -m analysis.pretrained.freezing read MODEL TOKENS.npz PATCH --results FREEZING.csv
    python -m analysis.pretrained.freezing table [FREEZING.csv]

Under the policy that spends the budget on novels, units are frozen that send all but a share of the
tokens to one expert (`router.freeze(share=...)`), or the key heads that look far least, the price
set anew so that the cost stays (`router.freeze(free=...)`); chosen on windows of all four kinds of
text. What that costs, and how far it is from the unpatched model, is read on as many others. Bytes
are those of the cache of transformers behind one window, measured.
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
from analysis.pretrained.table import percent, standard_error
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.routing.policy import Budget
from bayes_router.transformer.nll import token_kl

RESULTS = Path(__file__).parents[1] / "results" / "pretrained_freezing.csv"
SHARES = (0.01, 0.02, 0.03, 0.05, 0.1)
FREES = (0.4,)
KEYS = ["fit", "window", "context", "budget", "by", "asked"]
"""A line of the table."""


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
    frees: tuple[float, ...] = FREES,
) -> Iterator[dict[str, Any]]:
    """A row a share, or a part of the cache, and window on which the loss was read."""
    dial, _ = Reader(router).meet(texts["novels"], context, budget)
    policy = Budget(tuple(router.cost_ratio.tolist()), dial)
    tokens = mixed(texts, context, each)
    count = (len(tokens) - 1) // context
    rest = TokenStream(tokens[count // 2 * context :], texts["novels"].vocab_size)
    router.policy = policy
    before = far(router, rest, context)
    for by, ways in (("share", shares), ("free", frees)):
        for way in ways:
            router.policy = policy
            given: dict[str, Any] = {by: way}
            found = router.freeze(tokens, context=context, limit=len(tokens), **given)
            row = {"budget": budget, "by": by, "asked": way, "frozen": found.frozen}
            row |= {"units": found.units, "short": found.short, "key_heads": found.key_heads}
            row |= {"context": context, "bytes_before": found.bytes_before, "bytes": found.bytes}
            row |= {"cost_before": found.cost_before, "cost": found.cost}
            after = far(router, rest, context)
            router.thaw()
            for piece, (lost, old, new) in enumerate(zip(found.apart, before, after, strict=True)):
                yield row | {"piece": piece, "lost": lost, "kl_before": old, "kl": new}
    router.policy = policy


def far(router: RoutedPretrained, stream: TokenStream, context: int) -> list[float]:
    """KL(unpatched || routed as now) of each window of a text, nats per token."""
    found = []
    for batch in stream.windows(context, 1):
        ids = batch.tokens.to(router.device)
        with torch.no_grad(), router.forced_to(None):
            now = router(ids, "hard", use_cache=False).logits
        found.append(float(token_kl(router.unrouted(ids), now).double().mean()))
    return found


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A line a kind of fit, budget, rule and what was asked of it, means over seeds.

    `SE` is over windows, each averaged over seeds first. KL is from the unpatched model, in
    hundredths of a nat per token, before and after.
    """
    frame = frame.assign(
        freed=100 * (1 - frame["bytes"] / frame["bytes_before"]),
        frozen=100 * frame["frozen"] / frame["units"],
        more=frame["kl"] - frame["kl_before"],
    )
    rows = []
    for key, cell in frame.groupby(KEYS):
        fit, window, context, budget, by, asked = key
        row = {"rule": by, "asked": asked, "fit": fit, "window": window}
        row |= {"context": context, "budget": budget}
        row |= {"seeds": cell["seed"].nunique(), "windows": cell["piece"].nunique()}
        row |= {"units, %": cell["frozen"].mean(), "bytes freed, %": cell["freed"].mean()}
        pieces = cell.groupby("piece")[["lost", "more"]].mean()
        row |= {"lost, %": percent(pieces["lost"].mean())}
        row |= {"SE": 100 * standard_error(pieces["lost"])}
        row |= {"cost before": cell["cost_before"].mean(), "cost": cell["cost"].mean()}
        row |= {"KL before": 100 * cell["kl_before"].mean(), "KL": 100 * cell["kl"].mean()}
        rows.append(row | {"SE of KL": 100 * standard_error(pieces["more"])})
    digits = {"units, %": 1, "bytes freed, %": 1, "KL before": 2, "KL": 2, "SE of KL": 2}
    return pd.DataFrame(rows).round(3).round(digits)


def main() -> None:
    """Read, or print."""
    command(__doc__, RESULTS, _rows, summary, _options, "0.3")


def _options(read: argparse.ArgumentParser) -> None:
    read.add_argument("--seed", type=int, default=0, help="of the fit, for the rows")
    read.add_argument("--fit", help="what it observed, for the rows; default PATCH")
    read.add_argument("--each", type=int, default=8, help="windows of each text, half to choose")
    for name, ways in (("shares", SHARES), ("frees", FREES)):
        read.add_argument(f"--{name}", default=",".join(map(str, ways)))


def _rows(
    router: RoutedPretrained, texts: dict[str, TokenStream], args: argparse.Namespace, budget: float
) -> Iterator[dict[str, Any]]:
    ways = [tuple(map(float, filter(None, a.split(",")))) for a in (args.shares, args.frees)]
    for row in freeze(router, texts, args.context, args.each, budget, ways[0], ways[1]):
        yield {"fit": args.fit or args.patch, "seed": args.seed} | row


if __name__ == "__main__":
    sys.exit(main())
