"""Does the router find the tokens that need full attention?

`python -m analysis.routes.recall [--steps 1500] [--seed 0]`.

Associative recall, where it is known: a queried key needs `full` in the layer that looks it up,
filler does not (see `bayes_router.data.recall`). The model starts on full attention; then the
compute-aware prior is annealed in. Printed and written to analysis/results/recall.csv: accuracy
under HARD, and in each layer the share of tokens on `full`, for query tokens and for all others.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bayes_router.benchmark.rows import Rows
from bayes_router.config import Config, config_from_dict
from bayes_router.data.recall import RecallBatch, RecallData
from bayes_router.training.fit import fit
from bayes_router.transformer.model import RoutedLanguageModel

RESULTS = Path(__file__).parents[1] / "results" / "recall.csv"


def recall_config(steps: int, seed: int, device: str = "auto") -> Config:
    """Two layers of full, linear and local attention, started on full."""
    return config_from_dict(
        {
            "model": {
                "d_model": 64,
                "num_layers": 2,
                "num_heads": 4,
                "window": 16,
                "experts": ["full", "linear", "local"],
                "controller_hidden": 32,
            },
            "prior": {"temperature": 0.3, "total_concentration": 0.5, "price": 10.0},
            "schedule": {
                "kl_weight": 0.003,
                "start_experts": ["full"],
                "anneal_from": 0.5,
                "anneal_to": 0.8,
            },
            "data": {"corpus": "recall", "context": 128, "eval_tokens": 16_384},
            "train": {
                "steps": steps,
                "batch_size": 32,
                "warmup": 100,
                "weight_decay": 0.01,
                "eval_every": max(1, steps // 5),
                "checkpoint_every": 0,
                "seed": seed,
                "device": device,
            },
        }
    )


@torch.no_grad()
def rates(model: RoutedLanguageModel, windows: int = 128) -> dict[str, Any]:
    """Accuracy of HARD on queries and on filler.

    And the share of tokens on `full` by layer and kind of token.
    """
    device = next(model.parameters()).device
    full = model.config.experts.index("full")
    batch = next(RecallData().windows(128, windows))
    assert isinstance(batch, RecallBatch)
    tokens, targets = batch.tokens.to(device), batch.targets.to(device)
    query = batch.is_query.to(device)
    out = model.eval()(tokens, "hard")
    right, filler = out.logits.argmax(-1) == targets, (targets != -100) & ~query
    row: dict[str, Any] = {
        "query_accuracy": float(right[query].double().mean()),
        "filler_accuracy": float(right[filler].double().mean()),
    }
    for layer, route in enumerate(out.route):
        row[f"full_rate_query_{layer}"] = float((route[query] == full).double().mean())
        row[f"full_rate_other_{layer}"] = float((route[~query] == full).double().mean())
    return row


def main() -> None:
    """Fit, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, summary = fit(
            recall_config(args.steps, args.seed, args.device), Path(folder) / "run"
        )
    row = {
        "steps": args.steps,
        "seed": args.seed,
        **rates(model),
        "cost_paper": summary["executed_cost"]["paper"],
    }
    row |= {
        "nll_hard": summary["nll"]["hard"],
        "seconds": summary["seconds"],
        "device": summary["device"],
    }
    rows = Rows(args.out, digits=None, resume=True)
    rows.rows = [one for one in rows.rows if (one["seed"], one["steps"]) != (args.seed, args.steps)]
    rows.add(row)
    print(pd.Series(row).to_string())


if __name__ == "__main__":
    main()
