"""Which uncertainty buys anything?

`python -m analysis.routes.unsure [--seeds 5] [--steps 300] [--out FOLDER]`.

Small fits of one setting, a seed each. In each, tokens that a signal points at take the stronger
expert of a layer (the costliest whose posterior mean is at least 0.05), as many as a rise in
executed cost pays for; beside it the price is moved until argmax costs the same. Signals: the old
probability that the largest weight is the largest; confidence, fitted to regret; evidence, the
running mean; risk, of the token. All but the price know the whole routed pass: they are read from
it, and the changed routes are executed in a second one. Every difference is paired by seed and read
on windows that no signal was fitted on. Writes unsure.csv, a row a seed, rise and signal, and
unsure_paired.csv, the differences over seeds.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.figures import write
from analysis.routes.dial import at_cost
from bayes_router.config import Config, config_from_dict
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.measures.confidence import Confidence
from bayes_router.diagnostics.measures.regret import SEEN, routing_regret, seen_of
from bayes_router.routing.posterior import (
    categorical_entropy,
    entropy_of_mean,
    posterior_mean,
    probability_of_largest,
)
from bayes_router.routing.risk import RiskFit
from bayes_router.routing.watch import watching
from bayes_router.training.checkpoint import load_run
from bayes_router.training.dial import STEEPEST, Dial
from bayes_router.training.evidence import training_batches
from bayes_router.training.fit import fit, load_data
from bayes_router.training.risk import fit_risk, read_risk, reference_of
from bayes_router.transformer.build import build_prior
from bayes_router.transformer.nll import token_nll

TOLERANCE, LEAST_MEAN = 0.01, 0.05
RISES = (0.05, 0.15)  # of executed cost, relative
SIGNALS = ("probability", "confidence", "evidence", "risk", "random")


def settings(seed: int, steps: int, corpus: str) -> Config:
    """A model that is fitted in less than a minute on two cores."""
    return config_from_dict(
        {
            "model": {"d_model": 64, "num_layers": 3, "num_heads": 4,
                "experts": ["full", "gated", "local"], "window": 16},
            "prior": {"cost": "paper", "temperature": 0.3, "total_concentration": 0.5,
                "price": 5.0},
            "schedule": {"kl_weight": 0.003, "start_total_concentration": 0.5},
            "data": {"corpus": corpus, "context": 128, "eval_tokens": 2048},
            "train": {"steps": steps, "batch_size": 8, "lr": 3e-3, "controller_lr": 3e-3,
                "warmup": 30, "seed": seed,
                      "eval_every": steps, "checkpoint_every": steps, "device": "cpu"},
        }
    )  # fmt: skip


def frame_of(model: Any, rows: Tensor, out: Any, risk: Tensor) -> pd.DataFrame:
    """Every token and layer of a pass over rows [B, T], as `Confidence` reads it: [L B T] rows."""
    L, B, T = out.route.shape[:3]
    q = out.concentration[..., 0, :].double()
    mean = posterior_mean(q)
    entropy = categorical_entropy(out.logits.double().softmax(-1))
    names = list(model.config.experts)
    seen = [seen_of(*one) for one in zip(out.logits, rows, strict=True)]
    known = {name: np.tile(np.concatenate([one[name] for one in seen]), L) for name in SEEN}
    known |= {
        "layer": np.arange(L).repeat(B * T),
        "position": np.tile(np.arange(T), L * B),
        "choice": np.array(names)[out.route[..., 0].flatten().numpy()],
        "entropy_of_mean": entropy_of_mean(q).flatten().numpy(),
        "total_concentration": q.sum(-1).flatten().numpy(),
        "predictive_entropy": entropy.expand(L, B, T).flatten().numpy(),
        "risk": risk.expand(L, B, T).flatten().numpy(),
    }
    return pd.DataFrame(
        known | {f"mean_{name}": mean[..., e].flatten().numpy() for e, name in enumerate(names)}
    )


@torch.no_grad()
def signals_of(model: Any, rows: Tensor, confidence: Confidence) -> tuple[Any, dict[str, Tensor]]:
    """A routed pass over rows [B, T], and how much each signal asks for more at each token and
    layer, [L, B, T].
    """
    with watching(model.controller) as watch:
        out = model(rows)
    risk, shape = read_risk(model, rows), out.route.shape[:3]
    right = torch.from_numpy(confidence(frame_of(model, rows, out, risk))).view(shape)
    q = out.concentration[..., 0, :]
    random = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = {
        "probability": 1 - probability_of_largest(q, out.route[..., 0]),
        "confidence": 1 - right,
        "evidence": -watch.log_evidence,
        "risk": risk.expand(shape),
        "random": random,
    }
    return out, {name: signal.double() for name, signal in found.items()}


def raised(out: Any, signal: Tensor, cost: Tensor, rise: float) -> Tensor:
    """Routes [L, B, T, R] where the tokens that the signal points at take the stronger expert, for
    so much more.
    """
    q, base = out.concentration[..., 0, :], out.route[..., 0]
    stronger = torch.where(posterior_mean(q) >= LEAST_MEAN, cost.to(q), -1.0).argmax(-1)
    more = (cost[stronger] - cost[base]).clamp_min(0).double()
    order = signal.masked_fill(more <= 0, -torch.inf).flatten().argsort(descending=True)
    paid = more.flatten()[order].cumsum(0)
    taken = order[paid <= rise * float(cost[base].double().sum())]
    changed = base.flatten().clone()
    changed[taken] = stronger.flatten()[taken]
    return changed.view_as(base)[..., None]


@torch.no_grad()
def read_seed(seed: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Fit, then every signal at every rise against the price at the same executed cost."""
    config = settings(seed, options.steps, options.corpus)
    with torch.enable_grad():
        fit(config, folder, progress=False)
    config, model = load_run(folder, "cpu")
    model.eval()
    data, T = load_data(config)[1], config.data.context
    cost = build_prior(config.prior, config.model, config.model.num_layers, T).cost_ratio.float()
    own = list(itertools.islice(training_batches(data.train, 10**6, 8, T, seed), 32))
    fit_risk(model, own, reference_of(model, own[:2]), tokens=16_384, settings=RiskFit(steps=500))
    held = list(data.valid.windows(T, 8, 8 * T * 12))
    confidence = Confidence(routing_regret(model, held[:4], 24), config.model.experts, TOLERANCE)
    read = held[4:]
    rows, targets = (
        torch.cat([getattr(batch, name) for batch in read]) for name in ("tokens", "targets")
    )
    out, signals = signals_of(model, rows, confidence)
    dial = Dial(model, _Fixed(read), cost, context=T, batch_size=8, limit=rows.numel())
    start, found = dial.read(0.0), list[dict[str, Any]]()
    for end in (-STEEPEST, STEEPEST):
        dial.read(end)
    for rise, name in itertools.product(RISES, SIGNALS):
        route = raised(out, signals[name], cost, rise)
        nll = token_nll(model(rows, force=route).logits, targets).double().mean()
        spent = float(cost[route].double().mean())
        plain = at_cost(dial, spent)
        found.append(
            {
                "seed": seed,
                "rise": rise,
                "signal": name,
                "cost": spent,
                "nll": float(nll),
                "price_nll": plain.nll,
            }
        )
        found[-1] |= {"start_cost": start.cost, "start_nll": start.nll, "windows": len(rows)}
    return found


class _Fixed:
    """These windows and no others, as a dial reads them."""

    def __init__(self, batches: list[Batch]):
        self.batches = batches

    def windows(self, context: int, batch_size: int, limit: int | None = None) -> Any:
        """All of them."""
        return iter(self.batches)


def paired(table: pd.DataFrame) -> pd.DataFrame:
    """By rise and signal: nll above moving the price at the same cost, mean over seeds and the ends
    of its 95% interval.
    """
    from scipy import stats

    rows = []
    for (rise, signal), part in table.groupby(["rise", "signal"], sort=False):
        above, n = part["nll"] - part["price_nll"], len(part)
        half = float(stats.t.ppf(0.975, n - 1)) * above.std() / n**0.5 if n > 1 else float("nan")
        rows.append(
            {
                "rise": rise,
                "signal": signal,
                "nll above price": above.mean(),
                "low": above.mean() - half,
            }
        )
        rows[-1] |= {
            "high": above.mean() + half,
            "n": n,
            "cost": part["cost"].mean(),
            "start_cost": part["start_cost"].mean(),
        }
    return pd.DataFrame(rows)


def main() -> None:
    """Parse; fit and read seed by seed; print the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--out", type=Path, default=Path("analysis/results"))
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found += read_seed(seed, options, Path(folder) / "run")
        table = pd.DataFrame(found)
        print(
            (
                f"\nafter seed "
                f"{seed}\n{paired(table).to_string(index=False, float_format=lambda x: f'{x:.4f}')}"
            ),
            flush=True,
        )
        write(options.out, {"unsure": table, "unsure_paired": paired(table)}, {})


if __name__ == "__main__":
    main()
