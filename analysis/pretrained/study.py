"""Routes SmolLM2-135M, or another decoder, by token and query head.

Fits, rivals at equal executed cost, texts and retrieval.

    python -m analysis.pretrained.study fit MODEL TOKENS.npz PATCH --contender NAME --window 1024
    python -m analysis.pretrained.study read MODEL TOKENS.npz PATCH --results RESULTS.csv

MODEL is the folder of the checkpoint; TOKENS.npz is written by `analysis.pretrained.texts`. NAME is
one of `CONTENDERS`. Read by `analysis.pretrained.reading`; `analysis.pretrained.table` prints what
RESULTS.csv holds. Of a model some of whose layers have a window of their own (Gemma 3, see
`analysis.pretrained.cut_vocabulary`) only the others are routed, and costs are theirs alone.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from analysis.pretrained.loading import load_model
from analysis.pretrained.reading import ASKED, BUDGETS, LONGEST, SINKS, Extent, read
from analysis.pretrained.retrieval import Haystack
from analysis.pretrained.rivals import blind, passkeys
from analysis.pretrained.texts import load, others
from bayes_router.benchmark.rows import Rows
from bayes_router.config import PriorConfig, ScheduleConfig
from bayes_router.data.mixture import Mixture
from bayes_router.data.stream import TokenStream
from bayes_router.inference.likelihood import Observed
from bayes_router.integrations.huggingface.fit_settings import TEXT_SHARE
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.huggingface.pressure import BudgetRange
from bayes_router.integrations.patching import load_patch, patch

SHARES = "0.03,0.9"  # of what may be spent beyond the window, the range that a fit serves
KL_WEIGHT = 1e-5
CONTENDERS = {  # name: (unit, whether the token decides)
    "token x query head": ("head", True),
    "token x key head": ("kv_head", True),
    "token x layer": ("layer", True),
    "static, query heads": ("head", False),
    "static, key heads": ("kv_head", False),
    "static, layers": ("layer", False),
    "DuoAttention's objective": ("kv_head", False),
}


def haystack(tokenizer: Any, stream: TokenStream) -> Haystack:
    """Running text of `stream`, and lists of its own words of one token each."""
    ids = stream.tokens.tolist()

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    counted = Counter(re.findall(r"\b[a-z]{4,9}\b", tokenizer.decode(ids[:200_000])))
    words = [w for w, _ in counted.most_common(4000) if len(encode(f" {w}")) == 1]
    return Haystack(encode, ids, words)


def whole_layers(model: Any) -> tuple[int, ...] | None:
    """The layers that see all keys, where others see a window of their own; else None, all."""
    kinds = getattr(model.config, "layer_types", None) or []
    whole = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    return whole if len(whole) < len(kinds) else None


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
        layers=whole_layers(model),
        context=max(contexts),
        controller_hidden=0,
    )
    router.full_up_to = 0  # routes are read at every length
    if contender.startswith("Duo"):
        hay = haystack(AutoTokenizer.from_pretrained(args.model), texts.streams["novels"])
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
        likelihood=args.likelihood,
        graph=args.graph,
        budget=tuple(least + (1 - least) * s for s in map(float, args.shares.split(","))),
        schedule=schedule,
        distil_steps=0,
        seed=args.seed,
        progress=False,
    )
    print(f"{contender}, window {args.window}, seed {args.seed}: {len(frame)} steps")
    frame["asked"] = BudgetRange.MIDDLE * np.exp(-frame["dial"] * (1 - least) / BudgetRange.SLOPE)
    shown = frame[["step", "context", "asked", "cost", "price", "nll", "kl"]]
    print(shown.iloc[:: max(len(frame) // 16, 1)].round(5).to_string(index=False), flush=True)
    return router


def observed(given: str) -> str | float:
    """What a fit observes: a name, or the text's share."""
    return given if given in {o.value for o in Observed} else float(given)


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
    named = ", ".join(o.value for o in Observed)
    parser.add_argument(
        "--likelihood", type=observed, default=TEXT_SHARE, help=f"{named}, or the text's share"
    )
    parser.add_argument("--divergence", action="store_true", help="read KL from the unpatched, too")
    parser.add_argument("--graph", action="store_true", help="steps replayed from a CUDA graph")
    parser.add_argument("--contexts", default=str(LONGEST), help="lengths that a fit draws from")
    parser.add_argument("--shares", default=SHARES, help="of what is beyond the window, a range")
    parser.add_argument("--lengths", default=f"{LONGEST},4096,2048", help="lengths that are read")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--asked", default=",".join(map(str, ASKED)), help="budgets of retrieval")
    parser.add_argument("--others", action="store_true", help="read kinds that no fit read, too")
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
    if args.others:
        texts |= others(args.tokens, model.config.vocab_size)
    lengths = tuple(map(int, args.lengths.split(",")))
    budgets, asked = (
        tuple(map(float, filter(None, part.split(",")))) for part in (args.budgets, args.asked)
    )
    extent = Extent(
        lengths,
        args.pieces,
        args.prompts,
        tuple(texts),
        budgets,
        asked,
        windows=args.windows,
        seconds=args.read_seconds,
        divergence=args.divergence,
    )
    rows = Rows(args.results, {"window": router.settings.window, "seed": args.seed})
    hay = None
    if args.prompts:
        hay = haystack(AutoTokenizer.from_pretrained(args.model), texts["novels"])
    read(router, contender, texts, hay, extent, rows)
    rows.finish()


if __name__ == "__main__":
    sys.exit(main())
