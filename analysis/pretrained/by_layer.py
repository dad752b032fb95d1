"""The rows of `analysis.pretrained.smollm`: routes against static choices of layers."""

import argparse
import math
import time
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any, Optional

import pandas as pd
import torch
from torch import Tensor

from analysis.pretrained.contenders import (
    executed_cost,
    hybrid,
    layers_within,
    loads,
    meet,
    orders,
    share,
    timings,
    window_of,
    windowed,
)
from analysis.pretrained.loading import load_model, load_streams, phase
from bayes_router.attention.cost import cost_ratios
from bayes_router.benchmark.rows import Rows
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.patching import load_patch
from bayes_router.transformer.build import build_experts
from bayes_router.transformer.nll import token_nll
from bayes_router.types import CostModel, Route

BUDGETS = (0.5, 0.3, 0.2)  # the first is what the target names
# and the text on which their prices are set
TESTS = {"novels": "train", "wikitext103": "wikitext103 valid"}
KEYS = ("text", "context", "contender", "budget")


def windows(stream: TokenStream, context: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, targets) [1, T] of consecutive windows, at most `limit` tokens of them."""
    return (
        (batch.tokens, batch.targets) for batch in stream.windows(context, 1, max(limit, context))
    )


@torch.no_grad()
def read(
    router: RoutedPretrained,
    stream: TokenStream,
    route: Optional[Route],
    context: int,
    limit: int,
    device: Any,
) -> Any:
    """(nats per token, executed cost) of a text under a route.

    Under the router's policy where it is None.
    """
    total, count, costs = 0.0, 0, []
    for tokens, targets in windows(stream, context, limit):
        executed: list[Tensor] = []

        def watch(layer: int, hidden: Tensor, executed: list[Tensor] = executed) -> Tensor | int:
            if route is not None:
                taken = route(layer, hidden)
            else:
                taken = router.policy(router.controller.posterior(layer, hidden).concentration)
            shape = hidden.shape[:2]
            executed.append(
                torch.full(shape, taken, device=device) if isinstance(taken, int) else taken
            )
            return taken

        logits = router.network(tokens.to(device), watch)
        total += float(token_nll(logits, targets.to(device)).double().sum())
        count += targets.numel()
        costs.append(executed_cost(router, torch.stack(executed)[:, 0]))
    return total / count, sum(costs) / len(costs)


class Comparison:
    """Reads the contenders of a patch, each row written as soon as it is known.

    Nothing is begun after `args.seconds`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.started = args, args.device, time.perf_counter()
        with phase("load the patch"):
            self.model = load_model(args.model, args.device, args.dtype)
            self.streams = load_streams(args.tokens, self.model.config.vocab_size)
            self.router: RoutedPretrained = load_patch(self.model, args.patch)
            self.router.full_up_to = 0  # routes are read at every length
        self.sinks = self.router.settings.sinks
        self.rows = Rows(args.results, digits=None, resume=True)
        self.done = {tuple(row[key] for key in KEYS) for row in self.rows.rows}
        self.lengths = (256, 512) if args.quick else tuple(map(int, args.lengths.split(",")))
        self.limit = 512 if args.quick else args.limit
        self.tails = {  # what prices are set on: the end of a text that is not tested
            text: TokenStream(
                self.streams[source].tokens[-4 * max(self.lengths) - 1 :].long(),
                self.model.config.vocab_size,
                source,
            )
            for text, source in TESTS.items()
        }
        self.full, self.local = (self.router.experts.index(name) for name in ("full", "local"))
        self.ordered: dict[int, dict[str, list[int]]] = {}

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() - self.started > self.args.seconds

    def static(self, kept: Collection[int]) -> Route:
        """Full attention in the layers that are kept, the window in all others."""
        return hybrid(kept, self.full, self.local)

    def add(
        self,
        text: str,
        context: int,
        contender: str,
        budget: float,
        route: Optional[Route],
        window: int = 0,
    ) -> None:
        """One row, unless it is there; a window is put in every local expert, 0: the patch's."""
        if (text, context, contender, budget) in self.done or self.late:
            return
        router, stream, begun = self.router, self.streams[text], time.perf_counter()
        row: dict[str, Any] = dict(zip(KEYS, (text, context, contender, budget), strict=True))
        with windowed(router, window) if window else nullcontext():
            nll, cost = read(router, stream, route, context, self.limit, self.device)
            cost = share(context, window, self.sinks) if window else cost
            row |= {"perplexity": math.exp(nll), "nll": nll, "cost": cost}
            if text == "novels" and self.args.repeats:
                tokens = stream.tokens[None, :context].long().to(self.device)
                row |= timings(router, tokens, route, self.args.repeats)
        row |= {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tokens": min(self.limit, len(stream)),
            "window": router.settings.window,
            "seed": self.args.seed,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "seconds": time.perf_counter() - begun,
        }
        self.rows.add(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def at_length(self, context: int) -> None:
        """All rows of a length: the original, each budget, the window alone."""
        experts = build_experts(self.router.config)
        self.router.cost_ratio = cost_ratios(experts, CostModel.FLOPS, context)
        for text in TESTS:
            self.add(text, context, "original", 1.0, self.static(range(len(self.router.layers))))
        for budget in BUDGETS:
            # what a static choice of layers can cost
            kept, target = layers_within(self.router, context, budget)
            if self.late:
                return
            if kept == 0:
                print(
                    f"budget {budget} at {context} tokens: below the window alone or within one "
                    f"layer of it; left out"
                )
                continue
            self.at_budget(context, budget, kept, target)
        for text in TESTS:
            self.add(text, context, "the window alone", 0.0, self.static([]))

    def at_budget(self, context: int, budget: float, kept: int, target: float) -> None:
        """The routed row, and static ones with `kept` layers on full, all at the cost `target`."""
        for text, tail in self.tails.items():
            executed = meet(self.router, tail, target, context, 2 * context)
            print(
                f"{text}: aim {target:.4f}, on {TESTS[text]} {executed:.4f}: {self.router.policy}",
                flush=True,
            )
            self.add(text, context, "routed", budget, None)
            if text == "novels":
                own = loads(self.router, tail, context, 2 * context, self.device)
        # after the first routed row, which is the one that counts
        found = self.static_orders(self.args.order_tokens or context) | {"the router's own": own}
        sets = {name: set(order[len(order) - kept :]) for name, order in found.items()}
        layers = len(self.router.layers)
        sets["every n-th"] = {round(i * layers / kept) for i in range(kept)}
        width = window_of(context, target, self.sinks)
        for text in TESTS:
            for name, chosen in sets.items():
                self.add(text, context, f"static, {name}", budget, self.static(chosen))
            self.add(text, context, "one window", budget, self.static([]), width)

    def static_orders(self, length: int) -> dict[str, list[int]]:
        """`orders` of the layers at a length, searched for once and in `args.order_seconds`."""
        if length not in self.ordered and self.args.order_seconds:
            with phase("static orders"):
                tokens = self.tails["novels"].tokens[None, :length].long().to(self.device)
                seconds = 2.0 if self.args.quick else self.args.order_seconds
                self.ordered[length] = orders(self.router, tokens, seconds)
        return self.ordered.get(length, {})


def table(args: argparse.Namespace) -> None:
    """One row a contender, length and text; each is written as soon as it is known."""
    comparison = Comparison(args)
    # the longest first: it is what the target names
    for context in sorted(comparison.lengths, reverse=True):
        if not comparison.late:
            comparison.at_length(context)
    summarise(comparison.rows.frame())


def summarise(frame: pd.DataFrame) -> None:
    """The table, perplexity relative to the original's beside it."""
    base = frame[frame["contender"] == "original"].set_index(["text", "context"])["perplexity"]
    frame["relative"] = [
        p / base.get((t, c), math.nan)
        for t, c, p in zip(frame["text"], frame["context"], frame["perplexity"], strict=True)
    ]
    columns = [
        "text",
        "context",
        "budget",
        "contender",
        "perplexity",
        "relative",
        "cost",
        "prefill_ms",
        "decode_ms",
    ]
    shown = frame.reindex(columns=columns)
    shown = shown.sort_values(
        ["text", "context", "budget", "perplexity"], ascending=[True, True, False, True]
    )
    with pd.option_context("display.width", 200, "display.max_rows", 200):
        print(shown.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
