"""Routes SmolLM2-135M: fits a patch on novels, then perplexity, executed cost and time against static choices of layers.

    python -m analysis.patch_smollm prepare MODEL TOKENS.npz --corpora DIR      # text to ids, once, on the CPU
    python -m analysis.patch_smollm fit MODEL TOKENS.npz PATCH                  # distil, then SVI; writes the patch
    python -m analysis.patch_smollm table MODEL TOKENS.npz PATCH RESULTS.csv    # rows that RESULTS.csv has are kept
    python -m analysis.patch_smollm both MODEL TOKENS.npz PATCH RESULTS.csv     # the model loaded once

MODEL is a folder of a Hugging Face checkpoint or of one GGUF file. DIR holds the unpacked corpora of data/README.md.
`--quick` does everything at toy size, on a CPU in minutes. Costs are FLOPs of attention relative to full at each length.
"""

import argparse
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayes_router.attention.cost import cost_ratios
from bayes_router.config import PriorConfig
from bayes_router.integrations.huggingface import RoutedPretrained
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.integrations.texts import TokenStream
from bayes_router.routing.policy import Argmax
from bayes_router.training.checkpoint import write_whole
from bayes_router.transformer.layer import build_experts
from bayes_router.types import CostModel, Route

BUDGETS = (1.0, 0.5, 0.3, 0.2)
TESTS = ("wikitext103", "novels")
WINDOW, SINKS = 256, 4
LIMITS = {"train": 2_000_000, "wikitext103": 300_000, "novels": 300_000}  # tokens kept of each text


def prepare(args: argparse.Namespace) -> None:
    """Write the ids of the three texts, as uint16."""
    gguf = next(iter(args.model.glob("*.gguf")), None)
    tokenizer = AutoTokenizer.from_pretrained(args.model, **({} if gguf is None else {"gguf_file": gguf.name}))
    novels = args.corpora / "novels100"
    texts = {
        "train": sorted((novels / "train").iterdir()),
        "wikitext103": [args.corpora / "wikitext103" / "test.txt"],
        "novels": sorted((novels / "valid").iterdir()),
    }
    ids = {}
    for name, paths in texts.items():
        limit = LIMITS[name] // (100 if args.quick else 1)
        share = limit // len(paths)  # of every document the beginning
        pieces = [tokenizer(p.read_text(encoding="utf-8")[: 8 * share])["input_ids"][:share] for p in paths]
        ids[name] = np.array([token for piece in pieces for token in piece], dtype=np.uint16)
        print(f"{name}: {len(ids[name]):,} tokens of {len(paths)} documents")
    write_whole(args.tokens, lambda path: np.savez_compressed(path.open("wb"), allow_pickle=False, **ids))


@cache
def load_model(folder: Path, device: torch.device) -> Any:
    """The pretrained model in evaluation mode, bfloat16 on a GPU and float32 on a CPU."""
    gguf = next(iter(folder.glob("*.gguf")), None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    extra = {} if gguf is None else {"gguf_file": gguf.name}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).to(device).eval()


def load_streams(path: Path, vocab_size: int) -> dict[str, TokenStream]:
    """The three texts by name."""
    with np.load(path) as held:
        return {name: TokenStream(torch.from_numpy(held[name].astype(np.int64)), vocab_size, name) for name in held.files}


def fit(args: argparse.Namespace) -> None:
    """Patch, distil, fit, save."""
    model = load_model(args.model, args.device)
    streams = load_streams(args.tokens, model.config.vocab_size)
    prior = PriorConfig(cost="flops", price=args.price, temperature=args.temperature)
    context = 128 if args.quick else args.context
    router = patch(
        model,
        window=32 if args.quick else WINDOW,
        sinks=SINKS,
        experts=tuple(args.experts.split(",")),
        prior=prior,
        context=512 if args.quick else 8192,
    )
    started = time.perf_counter()
    frame = router.fit(
        streams["train"],
        steps=3 if args.quick else args.steps,
        distil_steps=3 if args.quick else args.distil_steps,
        context=context,
        batch_size=2 if args.quick else args.batch_size,
        progress=True,
        seed=args.seed,
    )
    print(f"fitted in {time.perf_counter() - started:.0f} s on {args.device}")
    print(
        "distillation, relative squared error:", [round(e, 3) for e in frame.attrs["distillation"][:: max(args.steps // 8, 1)]]
    )
    print(frame.iloc[:: max(len(frame) // 12, 1)].to_string(index=False))
    router.save(args.patch)
    frame.to_csv(args.patch / "fit.csv", index=False)


def hybrid(fully: Collection[int], full: int, local: int) -> Route:
    """The route that puts the layers of `fully` on full attention and the others on local."""
    return lambda layer, hidden: full if layer in fully else local


def windows(stream: TokenStream, context: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, targets) [1, T] of consecutive windows, at most `limit` tokens of them."""
    return ((batch.tokens, batch.targets) for batch in stream.windows(context, 1, max(limit, context)))


@torch.no_grad()
def read(router: RoutedPretrained, stream: TokenStream, route: Route | None, context: int, limit: int, device: Any) -> Any:
    """(nats per token, executed cost) of a text under a route, or under the router's policy where it is None."""
    total, count, costs = 0.0, 0, []
    for tokens, targets in windows(stream, context, limit):
        executed: list[Tensor] = []

        def watch(layer: int, hidden: Tensor, executed: list[Tensor] = executed) -> Tensor | int:
            if route is not None:
                taken = route(layer, hidden)
            else:
                taken = router.policy(router.controller.posterior(layer, hidden).concentration)
            shape = hidden.shape[:2]
            executed.append(torch.full(shape, taken, device=device) if isinstance(taken, int) else taken)
            return taken

        with router.routed_by(watch):
            logits = router.logits(tokens.to(device), use_cache=False)
        total += float(F.cross_entropy(logits[0].float(), targets[0].to(device), reduction="sum"))
        count += targets.numel()
        costs.append(router.cost_ratio.to(device)[torch.stack(executed)].mean())
    return total / count, float(torch.stack(costs).mean())


def sensitivity(router: RoutedPretrained, stream: TokenStream, context: int, limit: int, device: Any) -> list[int]:
    """Layers by what it costs to put that one alone on `local`, the harmless first."""
    full, local = (router.experts.index(name) for name in ("full", "local"))
    losses = [read(router, stream, hybrid([i], local, full), context, limit, device)[0] for i in range(len(router.layers))]
    return sorted(range(len(losses)), key=lambda i: losses[i])


def static_routes(router: RoutedPretrained, order: list[int], budget: float) -> dict[str, Route]:
    """Hybrids whose cost is the largest within `budget`: some layers on full, the others local."""
    full, local = (router.experts.index(name) for name in ("full", "local"))
    num, ratio = len(router.layers), float(router.cost_ratio[local])
    kept = max(0, min(num, math.floor(num * (budget - ratio) / (1 - ratio) + 1e-9)))
    sets = {
        "static, least sensitive layers local": set(order[num - kept :]),
        "static, every n-th layer full": {round(i * num / kept) for i in range(kept)} if kept else set(),
        "static, last layers full": set(range(num - kept, num)),
    }
    return {name: hybrid(chosen, full, local) for name, chosen in sets.items()}


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall time of `run` in ms, the device drained before and after; two runs to warm up."""
    times = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started) if i >= 2 else math.inf)
    return float(np.median([t for t in times if t < math.inf]))


@torch.no_grad()
def timings(router: RoutedPretrained, tokens: Tensor, route: Route | None, repeats: int) -> dict[Hashable, Any]:
    """Prefill of [1, T], and one decoding step behind it, ms; the model as it is used, by its own forward pass."""
    model, device = router.model, tokens.device
    with nullcontext() if route is None else router.routed_by(route):
        prefill = median_ms(lambda: model(tokens, use_cache=True, logits_to_keep=1), device, repeats)
        cache = model(tokens[:, :-8], use_cache=True, logits_to_keep=1).past_key_values
        decode = median_ms(lambda: model(tokens[:, -1:], past_key_values=cache, use_cache=True), device, repeats)
    return {"prefill_ms": prefill, "decode_ms": decode}


def table(args: argparse.Namespace) -> None:
    """One row a contender, length and text; each is written as soon as it is known."""
    started, device = time.perf_counter(), args.device
    model = load_model(args.model, device)
    streams = load_streams(args.tokens, model.config.vocab_size)
    router: RoutedPretrained = load_patch(model, args.patch)
    frame = pd.read_csv(args.results) if args.results.exists() else pd.DataFrame()
    done = set() if frame.empty else set(zip(frame["text"], frame["context"], frame["contender"], frame["budget"], strict=True))
    rows: list[dict[Hashable, Any]] = frame.to_dict("records")
    lengths = (256, 512) if args.quick else tuple(map(int, args.lengths.split(",")))
    limit = 512 if args.quick else args.limit
    calibration = TokenStream(streams["train"].tokens[-4 * max(lengths) - 1 :].long(), model.config.vocab_size, "train")
    order: list[int] = []

    def add(text: str, context: int, contender: str, budget: float, route: Route | None) -> None:
        nonlocal rows
        if (text, context, contender, budget) in done or time.perf_counter() - started > args.seconds:
            return
        nll, cost = read(router, streams[text], route, context, limit, device)
        tokens = streams[text].tokens[None, :context].long().to(device)
        row: dict[Hashable, Any] = {
            "text": text,
            "context": context,
            "contender": contender,
            "budget": budget,
            "perplexity": math.exp(nll),
        }
        row |= {"nll": nll, "cost": cost}
        if text == TESTS[0]:
            row |= timings(router, tokens, route, args.repeats)
        row |= {
            "tokens": min(limit, len(streams[text])),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
        rows.append(row)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        write_whole(args.results, lambda path: pd.DataFrame(rows).to_csv(path, index=False))

    for context in sorted(lengths, reverse=True):  # the longest first: it is what the target names
        router.cost_ratio = cost_ratios(build_experts(router.config), CostModel.FLOPS, context)
        order = order or sensitivity(router, calibration, min(lengths), min(lengths), device)
        full, local = (router.experts.index(name) for name in ("full", "local"))
        for text in TESTS:
            add(text, context, "original", 1.0, hybrid(range(len(router.layers)), full, local))
            add(text, context, "window only", 0.0, hybrid([], full, local))
        for budget in BUDGETS:
            if budget < float(router.cost_ratio.min()):
                continue
            router.policy = Argmax()
            realised = router.set_budget(budget, calibration, context=context, limit=2 * context)
            print(f"budget {budget} at {context} tokens: cost {realised:.3f} on training text", flush=True)
            for text in TESTS:
                add(text, context, "routed", budget, None)
                if float(router.cost_ratio[local]) < budget < 1.0:
                    for name, route in static_routes(router, order, budget).items():
                        add(text, context, name, budget, route)
    summarise(pd.DataFrame(rows))


def both(args: argparse.Namespace) -> None:
    """Fit, unless PATCH is there, and make the table."""
    if not (args.patch / "router.json").exists():
        fit(args)
    table(args)


def summarise(frame: pd.DataFrame) -> None:
    """The table, perplexity relative to the original's beside it."""
    base = frame[frame["contender"] == "original"].set_index(["text", "context"])["perplexity"]
    frame["relative"] = [
        p / base.get((t, c), math.nan) for t, c, p in zip(frame["text"], frame["context"], frame["perplexity"], strict=True)
    ]
    columns = ["text", "context", "budget", "contender", "perplexity", "relative", "cost", "prefill_ms", "decode_ms"]
    shown = frame[columns].sort_values(["text", "context", "budget", "perplexity"], ascending=[True, True, False, True])
    with pd.option_context("display.width", 200, "display.max_rows", 200):
        print(shown.to_string(index=False, float_format=lambda x: f"{x:.3f}"))


def main() -> None:
    """Parse and run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size, for a CPU")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    commands = parser.add_subparsers(required=True)
    paths = {"model": Path, "tokens": Path, "patch": Path, "results": Path}
    fitted: dict[str, Any] = {"steps": 200, "distil_steps": 60, "context": 2048, "batch_size": 2, "seed": 0}
    fitted |= {"price": 2.0, "temperature": 0.3, "experts": "full,linear,local"}
    read_at: dict[str, Any] = {"lengths": "2048,8192", "limit": 65_536, "repeats": 5, "seconds": 1e9}
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
            sub.add_argument("--" + name.replace("_", "-"), type=type(default) if name != "corpora" else Path, default=default)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    args.command(args)


if __name__ == "__main__":
    main()
