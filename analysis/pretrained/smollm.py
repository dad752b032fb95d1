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
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from analysis.pretrained.by_layer import table
from analysis.pretrained.loading import load_model, load_streams, phase
from bayes_router.config import PriorConfig, ScheduleConfig
from bayes_router.files import write_whole
from bayes_router.integrations.patching import patch

WINDOW, SINKS = 1024, 4
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


def both(args: argparse.Namespace) -> None:
    """Fit, unless PATCH is there, and make the table."""
    started = time.perf_counter()
    if not (args.patch / "router.json").exists():
        fit(args)
    args.seconds -= time.perf_counter() - started
    table(args)


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
