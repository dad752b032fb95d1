"""Reads a routed language model: what it loses, what it costs, what it still finds.

Costs are keys read, position by position, over those that full attention reads. Every contender is
read at the same executed cost on each text: the dial is set so that it spends the budget there,
which needs no label.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.pretrained.contenders import executed_cost, share, window_of, windowed
from analysis.pretrained.retrieval import TASKS, Answered, Haystack, Question, prompts, score
from bayes_router.benchmark.rows import Rows
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.huggingface.pressure import BudgetRange
from bayes_router.routing.policy import Budget
from bayes_router.transformer.nll import token_kl, token_nll
from bayes_router.types import Route

SINKS, LONGEST = 4, 8192
BUDGETS = (0.3, 0.2, 0.5, 0.4, 0.15, 0.7)
TEXTS = ("novels", "wikitext", "python", "speeches")
ASKED = (0.3, 0.2)


@dataclass
class Setting:
    """A route for every token.

    By a dial of the router's own policy, or by a window that all layers share.
    """

    router: RoutedPretrained
    dial: float = 0.0
    width: int | None = None
    taken: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor | int:
        """Choices [B, T, R]."""
        router = self.router
        if self.width is not None:
            return router.experts.index("local")
        q = router.controller.posterior(layer, hidden)
        chosen = Budget(tuple(router.layer_cost[layer].tolist()), self.dial)(q.concentration)
        self.taken.append(chosen)
        return chosen

    def cost(self, context: int) -> Tensor:
        """Keys read over those of full attention, [B], since the last call."""
        if self.width is not None:
            return torch.tensor([share(context, self.width, SINKS)])
        routes = torch.stack(self.taken, 1)  # [B, L, T, R]
        self.taken.clear()
        return torch.tensor([executed_cost(self.router, one) for one in routes])


class Reader:
    """Reads texts under a setting, and remembers what the unpatched model said of them.

    With `divergence` also how far from it a setting is: KL(unpatched || routed), nats per token.
    """

    def __init__(self, router: RoutedPretrained, divergence: bool = False):
        self.router, self.unpatched = router, dict[tuple[str, int, int], list[float]]()
        self.divergence = divergence
        self.device = next(router.model.parameters()).device

    @property
    def fixed(self) -> bool:
        """Whether no token moves the choice: it costs the same in every text."""
        return not any(bool(one.out.weight.any()) for one in self.router.controller.layers)

    def pieces(
        self, stream: TokenStream, context: int, number: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, targets) [B, T] of `number` windows spread over the text.

        At most `LONGEST` tokens of them at once.
        """
        number = min(number, (len(stream) - 1) // context)
        starts = torch.from_numpy(np.linspace(0, len(stream) - context - 1, number).astype(int))
        for some in starts.split(max(1, LONGEST // context)):
            ids = stream.tokens[some[:, None] + torch.arange(context + 1)].long().to(self.device)
            yield ids[:, :-1], ids[:, 1:]

    @contextmanager
    def _by(self, setting: Setting) -> Iterator[Route]:
        width = nullcontext() if setting.width is None else windowed(self.router, setting.width)
        with width:
            yield setting

    @torch.no_grad()
    def nll(
        self, stream: TokenStream, context: int, number: int, route: Route, compared: bool = False
    ) -> Iterator[tuple[list[float], list[float]]]:
        """(mean nats per token, KL from the unpatched model) of each piece, batch by batch.

        No number stands for a KL that was not `compared`.
        """
        for tokens, targets in self.pieces(stream, context, number):
            logits = self.router.network(tokens, route).flatten(0, 1)
            parts = zip(logits.split(2048), targets.flatten().split(2048), strict=True)
            each = torch.cat([token_nll(a, b) for a, b in parts]).view_as(targets)
            far = torch.full_like(each, math.nan)
            if compared:
                before = self.router.unrouted(tokens).flatten(0, 1)
                far = token_kl(before, logits).view_as(targets)
            yield each.mean(1).tolist(), far.mean(1).tolist()

    def lost(
        self, name: str, stream: TokenStream, context: int, number: int, setting: Setting
    ) -> Iterator[dict[str, Any]]:
        """A row a piece."""
        key = (name, context, number)
        if key not in self.unpatched:
            full = self.router.experts.index("full")
            found = self.nll(stream, context, number, lambda layer, hidden: full)
            self.unpatched[key] = [nll for batch, _ in found for nll in batch]
        said, costs = list[tuple[float, float]](), list[float]()
        with self._by(setting):
            for nlls, kls in self.nll(stream, context, number, setting, self.divergence):
                said += zip(nlls, kls, strict=True)
                costs += setting.cost(context).expand(len(nlls)).tolist()
        for piece, ((nll, kl), before, cost) in enumerate(
            zip(said, self.unpatched[key], costs, strict=True)
        ):
            facts = {"piece": piece, "lost": nll - before, "unpatched": before, "cost": cost}
            yield facts | ({"kl": kl} if self.divergence else {})

    @torch.no_grad()
    def spent(self, stream: TokenStream, context: int, number: int, setting: Setting) -> float:
        """Executed cost alone: the model's head is not run; nor is the model by a fixed choice."""
        costs = list[float]()
        if self.fixed:
            width = self.router.model.config.hidden_size
            for layer in range(len(self.router.layers)):
                setting(layer, torch.zeros(1, context, width, device=self.device))
            return setting.cost(context).item()
        for tokens, _ in self.pieces(stream, context, number):
            with self.router.routed_by(setting):
                self.router.logits(tokens, use_cache=False, logits_to_keep=1)
            costs += setting.cost(context).tolist()
        return float(np.mean(costs))

    def meet(
        self, stream: TokenStream, context: int, budget: float, start: float | None = None
    ) -> tuple[float, float]:
        """(dial, cost first found).

        The dial at which two pieces of a text cost `budget`, from where the fit had it.
        """
        router, number = self.router, max(2, LONGEST // context)
        local = share(context, router.settings.window, SINKS)
        span = 1 - float(router.layer_cost.amin(-1).mean())
        wanted = (budget - local) / (1 - local)
        dial = (
            BudgetRange.SLOPE * math.log(BudgetRange.MIDDLE / wanted) / span
            if start is None
            else start
        )
        first, tried, step = None, list[tuple[float, float]](), BudgetRange.SLOPE / span

        def beyond(cost: float) -> float:
            return math.log(max(cost - local, 0) / (1 - local) + 0.003)

        for _ in range(40 if self.fixed else 7):  # gates may stand within 1e-4 of each other
            got = self.spent(stream, context, number, Setting(router, dial))
            first = got if first is None else first
            tried.append((dial, got))
            if abs(got - budget) < 0.002:
                break
            above = max(((d, c) for d, c in tried if c > budget), default=None)
            below = min(((d, c) for d, c in tried if c <= budget), default=None)
            if above and below:
                part = 0.5  # halves, where the line between the two ends does not soon lead there
                if len(tried) < 5:
                    part = (beyond(above[1]) - beyond(budget)) / (
                        beyond(above[1]) - beyond(below[1])
                    )
                dial = above[0] + part * (below[0] - above[0])
            else:
                dial += step * (beyond(got) - beyond(budget))
        assert first is not None
        return min(tried, key=lambda t: abs(t[1] - budget))[0], first

    @torch.no_grad()
    def retrieval(self, asked: list[Question], setting: Setting | None) -> list[Answered]:
        """Of each prompt; None: unpatched."""
        full, costs = self.router.experts.index("full"), list[float]()

        def last(tokens: Tensor, count: int) -> Tensor:
            route = (lambda layer, hidden: full) if setting is None else setting
            with self.router.routed_by(route):
                logits = self.router.logits(tokens, use_cache=False, logits_to_keep=count)
            costs.append(1.0 if setting is None else float(setting.cost(tokens.shape[1])))
            return logits

        with nullcontext() if setting is None else self._by(setting):
            found = score(last, asked, self.device)
        return [one._replace(cost=cost) for one, cost in zip(found, costs, strict=True)]


@dataclass
class Extent:
    """How much is read."""

    lengths: tuple[int, ...] = (8192, 4096, 2048)
    tokens: int = 98_304  # of each text at each length
    prompts: int = 12
    texts: tuple[str, ...] = TEXTS
    budgets: tuple[float, ...] = BUDGETS
    asked: tuple[float, ...] = ASKED  # budgets of retrieval, met on novels
    windows: bool = False  # also one window of equal cost everywhere, which needs no fit
    seconds: float = math.inf
    divergence: bool = False  # also KL from the unpatched model
    tasks: tuple[str, ...] = field(default_factory=lambda: tuple(TASKS))


def read(
    router: RoutedPretrained,
    contender: str,
    texts: dict[str, TokenStream],
    hay: Haystack | None,
    extent: Extent,
    rows: Rows,
) -> None:
    """All rows of a contender; those that count first. Prompts are made in `hay`."""
    reader, started = Reader(router, extent.divergence), time.perf_counter()

    def late() -> bool:
        return time.perf_counter() - started > extent.seconds

    def settings(text: str, context: int, budget: float) -> Iterator[tuple[str, Setting, float]]:
        dial, first = reader.meet(texts[text], context, budget)
        yield contender, Setting(router, dial), first
        if extent.windows:
            yield (
                "one window of equal cost",
                Setting(router, width=window_of(context, budget, SINKS)),
                math.nan,
            )

    for context in extent.lengths:
        for budget in extent.budgets:
            if budget < share(context, router.settings.window, SINKS) + 0.02:
                continue
            for text in extent.texts:
                if late():
                    return
                for name, setting, first in settings(text, context, budget):
                    facts = {
                        "contender": name,
                        "text": text,
                        "context": context,
                        "budget": budget,
                        "at_fit": first,
                    }
                    found = reader.lost(
                        text, texts[text], context, extent.tokens // context, setting
                    )
                    for row in found:
                        rows.add(facts | row)
        dials = dict[float, float]()
        for task in extent.tasks if hay and extent.prompts else ():
            asked = prompts(task, hay, context, extent.prompts)
            for budget in (1.0, *extent.asked):
                if late() or budget < share(context, router.settings.window, SINKS) + 0.02:
                    continue
                if budget < 1 and budget not in dials:
                    dials[budget] = reader.meet(texts["novels"], context, budget)[0]
                setting = Setting(router, dials[budget]) if budget < 1 else None
                facts = {"contender": contender, "text": task, "context": context, "budget": budget}
                found = reader.retrieval(asked, setting)
                for piece, one in enumerate(found):
                    rows.add(facts | {"piece": piece} | one._asdict())
