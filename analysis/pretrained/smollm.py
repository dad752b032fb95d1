"""Routes SmolLM2-135M: fits a patch on novels, then compares it.

Perplexity, executed cost and time against static choices of layers.

    # text to ids, once, on the CPU
    python -m analysis.pretrained.smollm prepare MODEL TOKENS.npz --corpora DIR
    # SVI at a budget; writes the patch
    python -m analysis.pretrained.smollm fit MODEL TOKENS.npz PATCH
    # rows that RESULTS.csv has are kept
    python -m analysis.pretrained.smollm table MODEL TOKENS.npz PATCH RESULTS.csv
    # the model loaded once
    python -m analysis.pretrained.smollm both MODEL TOKENS.npz PATCH RESULTS.csv

MODEL is a folder of a Hugging Face checkpoint or of one GGUF file. DIR holds the unpacked corpora
of data/README.md. `--quick` does everything at toy size, on a CPU in minutes. Costs are keys read,
position by position, over those that full attention reads (FLOPs of attention, in other words).
Routes are fitted by self-distillation, executed as they are drawn, at the cost that they are to
have; static choices get the same cost. `--seconds` bounds the whole, `--fit-seconds` the fit,
`--order-seconds` the search for static choices of layers (0: only those that need none), which
reads `--order-tokens` of a text (0: as many as the row); `--repeats 0` leaves the times out;
`--dtype` is bfloat16 on a GPU and float32 on a CPU.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import AutoTokenizer

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
from bayes_router.attention.cost import cost_ratios
from bayes_router.benchmark.rows import Rows
from bayes_router.config import PriorConfig, ScheduleConfig
from bayes_router.data.stream import TokenStream
from bayes_router.files import write_whole
from bayes_router.integrations.huggingface.loading import load_base
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.transformer.build import build_experts
from bayes_router.transformer.nll import token_nll
from bayes_router.types import CostModel, Route

BUDGETS = (0.5, 0.3, 0.2)  # the first is what the target names
# and the text on which their prices are set
TESTS = {"novels": "train", "wikitext103": "wikitext103 valid"}
WINDOW, SINKS = 1024, 4
KEYS = ("text", "context", "contender", "budget")
# tokens kept
LIMITS = {
    "train": 2_000_000,
    "wikitext103 valid": 40_000,
    "wikitext103": 300_000,
    "novels": 300_000,
}


def prepare(args: argparse.Namespace) -> None:
    """Write the ids of the texts, as uint16."""
    gguf = next(iter(args.model.glob("*.gguf")), None)
    tokenizer = AutoTokenizer.from_pretrained(
        args.model, **({} if gguf is None else {"gguf_file": gguf.name})
    )
    novels = args.corpora / "novels100"
    texts = {
        "train": sorted((novels / "train").iterdir()),
        "wikitext103 valid": [args.corpora / "wikitext103" / "valid.txt"],
        "wikitext103": [args.corpora / "wikitext103" / "test.txt"],
        "novels": sorted((novels / "valid").iterdir()),
    }
    ids = {}
    for name, paths in texts.items():
        limit = LIMITS[name] // (100 if args.quick else 1)
        share = limit // len(paths)  # of every document the beginning
        pieces = [
            tokenizer(p.read_text(encoding="utf-8")[: 8 * share])["input_ids"][:share]
            for p in paths
        ]
        ids[name] = np.array([token for piece in pieces for token in piece], dtype=np.uint16)
        print(f"{name}: {len(ids[name]):,} tokens of {len(paths)} documents")
    write_whole(
        args.tokens, lambda path: np.savez_compressed(path.open("wb"), allow_pickle=False, **ids)
    )


@cache
def load_model(folder: Path, device: torch.device, dtype: str = "auto") -> Any:
    """The pretrained model in evaluation mode.

    By default in bfloat16 on a GPU and float32 on a CPU.
    """
    gguf = next((file.name for file in folder.glob("*.gguf")), None)
    kind = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    return load_base(str(folder), gguf, device, dtype=getattr(torch, kind))


def load_streams(path: Path, vocab_size: int) -> dict[str, TokenStream]:
    """The texts by name."""
    with np.load(path) as held:
        return {
            name: TokenStream(torch.from_numpy(held[name].astype(np.int64)), vocab_size, name)
            for name in held.files
        }


def fit(args: argparse.Namespace) -> None:
    """Patch, distil what has parameters, fit, save."""
    with phase("load"):
        model = load_model(args.model, args.device, args.dtype)
        streams = load_streams(args.tokens, model.config.vocab_size)
    context = 128 if args.quick else args.context
    prior = PriorConfig(cost="flops", price=args.price, temperature=args.temperature)
    router = patch(
        model,
        window=32 if args.quick else args.window,
        sinks=SINKS,
        experts=tuple(args.experts.split(",")),
        prior=prior,
        context=context,
    )
    router.full_up_to = 0  # routes are read at every length
    schedule = ScheduleConfig(
        kl_weight=args.kl_weight / len(router.layers),
        start_experts=("full",),
        anneal_from=0.0,
        anneal_to=0.4,
        straight_through_from=0.0,  # what is executed is what is trained, from the first step
    )
    with phase(f"fit on {args.device}"):
        frame = router.fit(
            streams["train"],
            steps=3 if args.quick else args.steps,
            distil_steps=3 if args.quick else args.distil_steps,
            context=context,
            batch_size=args.batch_size,
            controller_lr=args.controller_lr,
            budget=args.budget,
            seconds=min(args.fit_seconds, args.seconds),
            schedule=schedule,
            progress=sys.stderr.isatty(),
            seed=args.seed,
        )
    router.save(args.patch)
    frame.to_csv(args.patch / "fit.csv", index=False)
    if frame.attrs["distillation"]:
        first, *_, last = frame.attrs["distillation"]
        print(f"distillation, relative squared error: {first:.3f} -> {last:.3f}")
    print(frame.iloc[:: max(len(frame) // 12, 1)].round(4).to_string(index=False), flush=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say how long it took."""
    started = time.perf_counter()
    yield
    print(f"[{name}: {time.perf_counter() - started:.1f} s]", flush=True)


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


def table(args: argparse.Namespace) -> None:
    """One row a contender, length and text; each is written as soon as it is known."""
    started, device = time.perf_counter(), args.device
    with phase("load the patch"):
        model = load_model(args.model, device, args.dtype)
        streams = load_streams(args.tokens, model.config.vocab_size)
        router: RoutedPretrained = load_patch(model, args.patch)
        router.full_up_to = 0  # routes are read at every length
    rows = Rows(args.results, digits=None, resume=True)
    done = {tuple(row[key] for key in KEYS) for row in rows.rows}
    lengths = (256, 512) if args.quick else tuple(map(int, args.lengths.split(",")))
    limit = 512 if args.quick else args.limit
    tails = {  # what prices are set on: the end of a text that is not tested
        text: TokenStream(
            streams[source].tokens[-4 * max(lengths) - 1 :].long(), model.config.vocab_size, source
        )
        for text, source in TESTS.items()
    }
    full, local = (router.experts.index(name) for name in ("full", "local"))

    def late() -> bool:
        return time.perf_counter() - started > args.seconds

    def add(
        text: str,
        context: int,
        contender: str,
        budget: float,
        route: Optional[Route],
        window: int = 0,
    ) -> None:
        if (text, context, contender, budget) in done or late():
            return
        begun, chosen = time.perf_counter(), windowed(router, window) if window else nullcontext()
        with chosen:
            nll, cost = read(router, streams[text], route, context, limit, device)
            row: dict[str, Any] = dict(zip(KEYS, (text, context, contender, budget), strict=True))
            cost = share(context, window, SINKS) if window else cost
            row |= {"perplexity": math.exp(nll), "nll": nll, "cost": cost}
            if text == "novels" and args.repeats:
                row |= timings(
                    router,
                    streams[text].tokens[None, :context].long().to(device),
                    route,
                    args.repeats,
                )
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        row |= {"dtype": str(model.dtype).removeprefix("torch.")}
        row |= {
            "tokens": min(limit, len(streams[text])),
            "window": router.settings.window,
            "seed": args.seed,
        }
        row |= {"device": name, "seconds": time.perf_counter() - begun}
        rows.add(row)
        print(
            {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in row.items()
            },
            flush=True,
        )

    ordered: dict[int, dict[str, list[int]]] = {}
    for context in sorted(lengths, reverse=True):  # the longest first: it is what the target names
        router.cost_ratio = cost_ratios(build_experts(router.config), CostModel.FLOPS, context)
        for text in TESTS:
            add(text, context, "original", 1.0, hybrid(range(len(router.layers)), full, local))
        length = args.order_tokens or context
        for budget in BUDGETS:
            # what a static choice of layers can cost
            kept, target = layers_within(router, context, budget)
            if late():
                return summarise(rows.frame())
            if kept == 0:
                print(
                    f"budget {budget} at {context} tokens: below the window alone or within one "
                    f"layer of it; left out"
                )
                continue
            for text, tail in tails.items():
                realised = meet(router, tail, target, context, 2 * context)
                print(
                    f"{text}: aim {target:.4f}, on {TESTS[text]} {realised:.4f}: {router.policy}",
                    flush=True,
                )
                add(text, context, "routed", budget, None)
                if text == "novels":
                    own = loads(router, tail, context, 2 * context, device)
            # after the first routed row, which is the one that counts
            if length not in ordered and args.order_seconds:
                with phase("static orders"):
                    tokens = tails["novels"].tokens[None, :length].long().to(device)
                    ordered[length] = orders(
                        router, tokens, 2.0 if args.quick else args.order_seconds
                    )
            found = ordered.get(length, {}) | {"the router's own": own}
            sets = {name: set(order[len(order) - kept :]) for name, order in found.items()}
            sets["every n-th"] = {round(i * len(router.layers) / kept) for i in range(kept)}
            for text in TESTS:
                for name, chosen in sets.items():
                    add(text, context, f"static, {name}", budget, hybrid(chosen, full, local))
                width = window_of(context, target, SINKS)
                add(text, context, "one window", budget, hybrid([], full, local), width)
        for text in TESTS:
            add(text, context, "the window alone", 0.0, hybrid([], full, local))
    summarise(rows.frame())


def both(args: argparse.Namespace) -> None:
    """Fit, unless PATCH is there, and make the table."""
    started = time.perf_counter()
    if not (args.patch / "router.json").exists():
        fit(args)
    args.seconds -= time.perf_counter() - started
    table(args)


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


def main() -> None:
    """Parse and run one of the three commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size, for a CPU")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the model"
    )
    commands = parser.add_subparsers(required=True)
    paths = {"model": Path, "tokens": Path, "patch": Path, "results": Path}
    fitted: dict[str, Any] = {
        "steps": 400,
        "distil_steps": 100,
        "context": 8192,
        "batch_size": 1,
        "seed": 0,
    }
    fitted |= {
        "price": 30.0,
        "temperature": 0.3,
        "kl_weight": 0.002,
        "controller_lr": 5e-3,
        "budget": 0.5,
    }
    fitted |= {"experts": "full,local", "window": WINDOW, "fit_seconds": 240.0, "seconds": 540.0}
    read_at: dict[str, Any] = {
        "lengths": "8192,4096,2048",
        "limit": 65_536,
        "repeats": 5,
        "seconds": 540.0,
    }
    read_at |= {"order_seconds": 60.0, "order_tokens": 0, "seed": 0}
    options: dict[Callable[[argparse.Namespace], None], tuple[int, dict[str, Any]]] = {
        prepare: (2, {"corpora": Path("corpora")}),
        fit: (3, fitted),
        table: (4, read_at),
        both: (4, fitted | read_at),
    }
    for command, (count, defaults) in options.items():
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        for name in list(paths)[:count]:
            sub.add_argument(name, type=paths[name])
        for name, default in defaults.items():
            sub.add_argument(
                "--" + name.replace("_", "-"),
                type=type(default) if name != "corpora" else Path,
                default=default,
            )
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    args.command(args)


if __name__ == "__main__":
    main()
