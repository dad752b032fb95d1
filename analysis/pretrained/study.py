"""Routes SmolLM2-135M by token and query head.

Fits, rivals at equal executed cost, texts and retrieval.

    python -m analysis.pretrained.study fit MODEL TOKENS.npz PATCH --contender NAME --window 1024
    python -m analysis.pretrained.study read MODEL TOKENS.npz PATCH --results RESULTS.csv

MODEL is the folder of the checkpoint; TOKENS.npz is written by `analysis.pretrained.texts`. NAME is
one of `CONTENDERS`. Costs are keys read, position by position, over those that full attention
reads. Every contender is read at the same executed cost on each text: the dial is set so that it
spends the budget there, which needs no label. `analysis.pretrained.table` prints what RESULTS.csv
holds.
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from analysis.pretrained.contenders import executed_cost, share, window_of, windowed
from analysis.pretrained.loading import load_model
from analysis.pretrained.retrieval import TASKS, Answered, Haystack, Question, prompts, score
from analysis.pretrained.rivals import blind, passkeys
from analysis.pretrained.texts import load
from bayes_router.benchmark.rows import Rows
from bayes_router.config import PriorConfig, ScheduleConfig
from bayes_router.data.mixture import Mixture
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.huggingface.pressure import BudgetRange
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.routing.policy import Budget
from bayes_router.transformer.nll import token_nll
from bayes_router.types import Route

SINKS, LONGEST = 4, 8192
SHARES = "0.03,0.9"  # of what may be spent beyond the window, the range that a fit serves
KL_WEIGHT = 1e-5
CONTENDERS = {  # name: (unit, whether the token decides)
    "token x query head": ("head", True),
    "token x KV head": ("kv_head", True),
    "token x layer": ("layer", True),
    "static, query heads": ("head", False),
    "static, KV heads": ("kv_head", False),
    "static, layers": ("layer", False),
    "DuoAttention's objective": ("kv_head", False),
}
BUDGETS = (0.3, 0.2, 0.5, 0.4, 0.15, 0.7)
TEXTS = ("novels", "wikitext", "python", "speeches")
NEEDLES = (0.3, 0.2)


def haystack(model: Path, stream: TokenStream) -> Haystack:
    """Running text of `stream`, and lists of its own words of one token each."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = stream.tokens.tolist()

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    counted = Counter(re.findall(r"\b[a-z]{4,9}\b", tokenizer.decode(ids[:200_000])))
    words = [w for w, _ in counted.most_common(4000) if len(encode(f" {w}")) == 1]
    return Haystack(encode, ids, words)


def fit(model: Any, texts: Mixture, contender: str, args: argparse.Namespace) -> RoutedPretrained:
    """The contender, fitted."""
    unit, by_token = CONTENDERS[contender]
    contexts = tuple(map(int, args.contexts.split(",")))
    prior = PriorConfig(
        cost="flops", price=args.price, temperature=0.3, total_concentration=args.total
    )
    router: RoutedPretrained = patch(
        model,
        window=args.window,
        sinks=SINKS,
        experts=("full", "local"),
        route_by=unit,
        prior=prior,
        context=max(contexts),
        controller_hidden=0,
    )
    router.full_up_to = 0  # routes are read at every length
    if contender.startswith("Duo"):
        hay = haystack(args.model, texts.streams["novels"])
        losses = passkeys(router, hay, max(contexts), args.seconds, args.steps, args.seed)
        print(
            f"{contender}: {len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}",
            flush=True,
        )
        return router
    if not by_token:
        blind(router)
    least = float(router.layer_cost.amin(-1).mean())
    schedule = ScheduleConfig(
        kl_weight=KL_WEIGHT / (len(router.layers) * router.config.num_units),
        start_total_concentration=args.total,
        anneal_from=0.0,
        anneal_to=0.0,
        straight_through_from=0.0,
    )
    frame = router.fit(
        texts,
        valid_fraction=0.02,
        steps=args.steps,
        seconds=args.seconds,
        context=contexts,
        batch_size=args.rows,
        controller_lr=args.lr,
        bias_lr=5 * args.lr,
        through=args.through,
        graph=args.graph,
        budget=tuple(least + (1 - least) * s for s in map(float, args.shares.split(","))),
        schedule=schedule,
        distil_steps=0,
        seed=args.seed,
        progress=False,
    )
    print(f"{contender}, window {args.window}, seed {args.seed}: {len(frame)} steps")
    frame["asked"] = BudgetRange.MIDDLE * np.exp(-frame["dial"] * (1 - least) / BudgetRange.SLOPE)
    shown = frame[["step", "context", "asked", "cost", "price", "kl", "divergence"]]
    print(shown.iloc[:: max(len(frame) // 16, 1)].round(5).to_string(index=False), flush=True)
    return router


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
    """Reads texts under a setting, and remembers what the unpatched model said of them."""

    def __init__(self, router: RoutedPretrained):
        self.router, self.unpatched = router, dict[tuple[str, int, int], list[float]]()
        self.device = next(router.model.parameters()).device

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
        self, stream: TokenStream, context: int, number: int, route: Route
    ) -> Iterator[list[float]]:
        """Mean nats per token of each piece, batch by batch."""
        for tokens, targets in self.pieces(stream, context, number):
            logits = self.router.network(tokens, route).flatten(0, 1)
            parts = zip(logits.split(2048), targets.flatten().split(2048), strict=True)
            each = torch.cat([token_nll(a, b) for a, b in parts])
            yield each.view_as(targets).mean(1).tolist()

    def lost(
        self, name: str, stream: TokenStream, context: int, number: int, setting: Setting
    ) -> Iterator[dict[str, Any]]:
        """A row a piece."""
        key = (name, context, number)
        if key not in self.unpatched:
            full = self.router.experts.index("full")
            self.unpatched[key] = sum(
                self.nll(stream, context, number, lambda layer, hidden: full), []
            )
        said, costs = list[float](), list[float]()
        with self._by(setting):
            for batch in self.nll(stream, context, number, setting):
                said += batch
                costs += setting.cost(context).expand(len(batch)).tolist()
        for piece, (nll, before, cost) in enumerate(
            zip(said, self.unpatched[key], costs, strict=True)
        ):
            yield {"piece": piece, "lost": nll - before, "unpatched": before, "cost": cost}

    @torch.no_grad()
    def spent(self, stream: TokenStream, context: int, number: int, setting: Setting) -> float:
        """Executed cost alone: the model's head is not run."""
        costs = list[float]()
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
        for _ in range(7):
            got = self.spent(stream, context, number, Setting(router, dial))
            first = got if first is None else first
            tried.append((dial, got))
            if abs(got - budget) < 0.002:
                break
            above = [d for d, c in tried if c > budget]
            below = [d for d, c in tried if c <= budget]
            if above and below and len(tried) > 2:
                dial = (max(above) + min(below)) / 2
            else:
                dial += step * math.log(
                    (max(got - local, 0) / (1 - local) + 0.003) / (wanted + 0.003)
                )
        assert first is not None
        return min(tried, key=lambda t: abs(t[1] - budget))[0], first

    @torch.no_grad()
    def retrieval(self, asked: list[Question], setting: Setting | None) -> list[Answered]:
        """Of each prompt; None: unpatched."""
        full = self.router.experts.index("full")

        def last(tokens: Tensor, count: int) -> Tensor:
            route = (lambda layer, hidden: full) if setting is None else setting
            with self.router.routed_by(route):
                return self.router.logits(tokens, use_cache=False, logits_to_keep=count)

        with nullcontext() if setting is None else self._by(setting):
            return score(last, asked, self.device)


@dataclass
class Extent:
    """How much is read."""

    lengths: tuple[int, ...] = (8192, 4096, 2048)
    tokens: int = 98_304  # of each text at each length
    prompts: int = 12
    texts: tuple[str, ...] = TEXTS
    budgets: tuple[float, ...] = BUDGETS
    windows: bool = False  # also one window of equal cost everywhere, which needs no fit
    seconds: float = math.inf


def read(
    router: RoutedPretrained,
    contender: str,
    texts: dict[str, TokenStream],
    hay: Haystack,
    extent: Extent,
    rows: Rows,
) -> None:
    """All rows of a contender; those that count first."""
    reader, started = Reader(router), time.perf_counter()

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
        for task in TASKS if extent.prompts else ():
            asked = prompts(task, hay, context, extent.prompts)
            for budget in (1.0, *NEEDLES):
                if late() or budget < share(context, router.settings.window, SINKS) + 0.02:
                    continue
                setting = None
                if budget < 1:
                    setting = Setting(router, reader.meet(texts["novels"], context, budget)[0])
                facts = {"contender": contender, "text": task, "context": context, "budget": budget}
                found = reader.retrieval(asked, setting)
                for piece, one in enumerate(found):
                    rows.add(facts | {"piece": piece} | one._asdict())


def options() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("do", choices=("fit", "read", "both"))
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("patch", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS, default="token x query head")
    parser.add_argument("--results", type=Path, help="rows that are read, .csv")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    numbers: dict[str, Any] = {
        "window": 1024,
        "seed": 0,
        "steps": 10_000,
        "rows": 1,
        "seconds": 110.0,
    }
    numbers |= {
        "lr": 1e-2,
        "total": 2.0,
        "price": 2000.0,
        "pieces": 98_304,
        "prompts": 12,
        "read_seconds": 1e9,
    }
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--through", choices=("draw", "mean"), default="mean")
    parser.add_argument("--graph", action="store_true", help="steps replayed from a CUDA graph")
    parser.add_argument("--contexts", default=str(LONGEST), help="lengths that a fit draws from")
    parser.add_argument("--shares", default=SHARES, help="of what is beyond the window, a range")
    parser.add_argument("--lengths", default=f"{LONGEST},4096,2048", help="lengths that are read")
    parser.add_argument("--budgets", default="0.3,0.2,0.5,0.4,0.15,0.7")
    parser.add_argument("--windows", action="store_true", help="read one window of equal cost, too")
    return parser


def main() -> None:
    """Fit or read."""
    args = options().parse_args()
    model = load_model(args.model, args.device)
    fitted, texts = load(args.tokens, model.config.vocab_size)
    if args.do != "read":
        router = fit(model, fitted, args.contender, args)
        router.save(args.patch)
        (args.patch / "contender.txt").write_text(args.contender)
    if args.do == "fit":
        return
    router = load_patch(model, args.patch)
    router.full_up_to = 0  # routes are read at every length
    contender = (args.patch / "contender.txt").read_text()
    lengths, budgets = (
        tuple(map(int, args.lengths.split(","))),
        tuple(map(float, args.budgets.split(","))),
    )
    extent = Extent(
        lengths,
        args.pieces,
        args.prompts,
        budgets=budgets,
        windows=args.windows,
        seconds=args.read_seconds,
    )
    rows = Rows(args.results, {"window": router.settings.window, "seed": args.seed})
    read(router, contender, texts, haystack(args.model, texts["novels"]), extent, rows)
    rows.finish()


if __name__ == "__main__":
    sys.exit(main())
