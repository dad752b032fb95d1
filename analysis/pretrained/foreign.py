"""A patch on text unlike its fit's.

What evidence tells, what a promise is worth there, and what a guard makes of it.

    python -m analysis.pretrained.foreign MODEL PATCH TOKENS.npz --fit NAME --own NAME --others ...

TOKENS.npz has token ids by name. Evidence is made from the text --fit; on the first windows of the
text --own a price is promised for (the cheapest of --prices, tried in that order) and the guard is
set; the later windows of --own, and the others, are read: executed cost and lost perplexity, bare
and guarded, with intervals over windows; with --auroc also that of evidence by token.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from analysis.figures import write
from bayes_router import load_patch
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.measures.bootstrap import clustered
from bayes_router.diagnostics.measures.evidence import auroc_of, token_scores
from bayes_router.integrations.huggingface.language import Unforced
from bayes_router.routing.policy import at_price
from bayes_router.training.executed import Executed, execute
from bayes_router.training.guarantee import Single, promise
from bayes_router.training.guarding import set_guard
from bayes_router.types import RoutingMode


def windows_of(ids: Tensor, count: int, context: int, skip: int = 0) -> list[Batch]:
    """`count` windows, evenly spread over a text, those of even number or (with `skip`) of odd."""
    starts = torch.linspace(0, len(ids) - context - 2, 2 * count).long()[skip::2]
    rows = torch.stack([ids[s : s + context + 1] for s in starts]).long()
    return [Batch(row[None, :-1], row[None, 1:]) for row in rows]


def against(read: Executed, base: Executed) -> dict[str, float]:
    """Lost perplexity over `base`, with its interval over windows."""
    more, scored = (read.window_nll - base.window_nll).numpy(), base.window_scored.numpy()
    lost = clustered(lambda i: math.expm1(more[i].sum() / scored[i].sum()), np.arange(len(more)))
    return {
        "cost": read.cost,
        "lost": lost.value,
        "low": lost.low,
        "high": lost.high,
        "windows": len(more),
    }


def main() -> None:
    """Parse; evidence, promise, guard; read each text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("patch", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--fit", required=True)
    parser.add_argument("--own", required=True)
    parser.add_argument("--others", nargs="+", required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--windows",
        type=int,
        default=16,
        help="read of each text; calibration takes as many of --own",
    )
    parser.add_argument("--fit-tokens", type=int, default=16_384)
    parser.add_argument("--prices", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--quality", type=float, default=0.02)
    parser.add_argument(
        "--auroc",
        action="store_true",
        help="of evidence by token too, for one more pass of each text",
    )
    parser.add_argument("--out", type=Path, default=Path("analysis/results"))
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    router, ids = load_patch(model, options.patch), dict(np.load(options.tokens))
    texts = {
        name: torch.from_numpy(ids[name].astype("int64"))
        for name in (options.fit, options.own, *options.others)
    }
    router.fit_evidence(texts[options.fit], context=options.context, tokens=options.fit_tokens)
    routed, cost, full = Unforced(router), router.layer_cost, router.experts.index("full")
    calibration = windows_of(texts[options.own], options.windows, options.context)
    family = at_price("argmax", router.cost_ratio.tolist())
    promised = promise(
        routed, calibration, cost, family, full, options.quality, prices=options.prices
    )
    print(promised, flush=True)
    bare = router.policy = family(promised.kept.price)
    found = set_guard(routed, router.controller, calibration, cost, full)
    print(found, flush=True)
    rows, scores = [], {}
    generator = torch.Generator().manual_seed(0)
    read = {
        name: windows_of(texts[name], options.windows, options.context, 1)
        for name in (options.own, *options.others)
    }
    own = torch.cat([batch.tokens for batch in read[options.own]])
    mixed = own.flatten()[torch.randperm(own.numel(), generator=generator)].view_as(own)
    read["shuffled"] = [Batch(row[None, :-1], row[None, 1:]) for row in mixed]
    for name, batches in read.items():
        base = execute(routed, batches, cost, RoutingMode.HARD, Single(full), math.nan).reading
        for policy in ("bare", "guard"):
            chosen = bare if policy == "bare" else found.policy
            reading = execute(routed, batches, cost, RoutingMode.HARD, chosen, 0.0).reading
            rows.append({"text": name, "policy": policy, **against(reading, base)})
        print(pd.DataFrame(rows[-2:]).to_string(index=False, header=False), flush=True)
        write(options.out, {"foreign_smollm_guard": pd.DataFrame(rows)}, {})
        if not options.auroc:
            continue
        router.policy, T = bare, batches[0].tokens.shape[1]
        flat = torch.cat(
            [*(batch.tokens.flatten() for batch in batches), batches[-1].targets[0, -1:]]
        )
        scores[name] = token_scores(router, flat, T)
    told = [
        {"text": name, "score": score, **auroc_of(values, scores[options.own][score])._asdict()}
        for name, of in scores.items() if name != options.own for score, values in of.items()
    ]  # fmt: skip
    if told:
        table = pd.DataFrame(told)
        print(table.to_string(index=False, float_format=lambda x: f"{x:.4f}"))
        write(options.out, {"foreign_smollm_evidence": table}, {})


if __name__ == "__main__":
    main()
