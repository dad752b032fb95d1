"""What a Bayesian training step costs.

`python -m analysis.speed.training_step`, on a GPU with `--device cuda`.

Four ways to train one network, in one process, taking turns step by step; each runs the same
Trainer (batch, objective, backward pass, clipping, AdamW). Figures are medians over the turns, and
ratios are medians of the ratios within a turn:

    bayes      the negative ELBO through Pyro: what `bayes-router fit` does
    no pyro    the same draws and the same KL in plain torch: what `bayes` takes longer is Pyro's
    softmax    the same controllers and experts, routes set to their mean weights: no draw, no KL
    full       plain full attention by the fastest kernel of the device, one expert, no controller

The CPU is timed in seconds of processor time of this process (other processes do not count), a GPU
by the wall clock, with the device idle before and after each step.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.routes.sweep import commit
from bayes_router.config import Config, with_changes
from bayes_router.data.load import load_data
from bayes_router.inference.tilted import TiltedDirichlet
from bayes_router.presets import preset
from bayes_router.routing.posterior import dirichlet_kl, posterior_mean
from bayes_router.routing.schedule import ScheduleState
from bayes_router.training.distributed import pick_device
from bayes_router.training.trainer import Objective, Trainer, svi_objective
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.nll import mean_nll
from bayes_router.types import LossTerms

RESULTS = Path(__file__).parents[1] / "results"
GOALS = {"softmax": {"cpu": 1.08, "cuda": 1.10}, "full": {"cpu": None, "cuda": 1.6}}
"""Most that `bayes` may cost, as a multiple of these."""


class Plain(nn.Module):
    """Cross-entropy under routes that `route` gives for a layer's controller and hidden state.

    No Pyro.
    """

    def __init__(
        self,
        model: RoutedLanguageModel,
        route: Callable[[RoutedLanguageModel, int, Tensor], Tensor | int],
    ):
        super().__init__()
        self.model, self.route = model, route

    def follow(self, state: ScheduleState) -> None:
        """Nothing moves."""

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms]:
        """Nats per token; no KL."""
        logits = self.model.network(
            tokens, lambda layer, hidden: self.route(self.model, layer, hidden)
        )
        nll = mean_nll(logits, targets)
        return nll, LossTerms(nll.detach(), torch.zeros_like(nll), -nll.detach())


class ByHand(nn.Module):
    """The negative ELBO of `RoutingModel` and `RoutingGuide`, written without effect handlers."""

    def __init__(self, model: RoutedLanguageModel, start: ScheduleState, cost_ratio: Tensor):
        super().__init__()
        self.model, self.cost_ratio, self.state = model, cost_ratio, start
        # the values move inside these, where a captured graph reads them
        self.concentration = start.concentration.to(cost_ratio.device, copy=True)  # [L, E]
        self.log_normaliser = torch.zeros(len(start.concentration), device=cost_ratio.device)
        self.tilt = torch.zeros_like(cost_ratio)
        self._move(start)

    def follow(self, state: ScheduleState) -> None:
        """Move the prior, where there is another."""
        known = self.state
        if known.price != state.price or not torch.equal(known.concentration, state.concentration):
            self._move(state)

    def _move(self, state: ScheduleState) -> None:
        self.state = state
        self.concentration.copy_(state.concentration)
        self.tilt.copy_(state.price * self.cost_ratio)
        if state.price > 0:
            prior = TiltedDirichlet(state.concentration, state.price * self.cost_ratio.cpu())
            self.log_normaliser.copy_(prior.log_normaliser)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, LossTerms]:
        """See `NegativeELBO`."""
        concentrations = []

        def route(layer: int, hidden: Tensor) -> Tensor:
            q = self.model.controller.posterior(layer, hidden)
            concentrations.append(q.concentration)
            return q.rsample()

        logits = self.model.network(tokens, route)
        nll = mean_nll(logits, targets)
        q = torch.stack(concentrations).squeeze(3)  # [L, B, T, E], routed by layer
        kl = dirichlet_kl(q, self.concentration[:, None, None]) + self.log_normaliser[:, None, None]
        if self.state.price > 0:
            kl = kl + posterior_mean(q) @ self.tilt
        total = kl.mean((1, 2)).sum()
        return nll + self.state.kl_weight * total, LossTerms(
            nll.detach(), total.detach(), -(nll + total).detach()
        )


def mean_route(model: RoutedLanguageModel, layer: int, hidden: Tensor) -> Tensor:
    """The mean weights of the controllers."""
    return model.controller.layers[layer](hidden).float().softmax(-1)


def only_full(model: RoutedLanguageModel, layer: int, hidden: Tensor) -> int:
    """Every token takes the one expert."""
    return 0


@dataclass
class Rival:
    """A trainer and what was measured of it."""

    trainer: Trainer
    seconds: list[float]
    peak_bytes: int = 0


def build(config: Config, device: torch.device) -> dict[str, Rival]:
    """The four, on the same data."""
    config, data = load_data(config)
    alone = with_changes(
        config, {"model.experts": ("full",), "prior.price": 0.0, "schedule.start_experts": ()}
    )

    def plain(
        route: Callable[[RoutedLanguageModel, int, Tensor], Tensor | int],
    ) -> Callable[..., Objective]:
        return lambda model, start, cost_ratio: Plain(model, route)

    def without_controller(config: Config) -> RoutedLanguageModel:
        model = RoutedLanguageModel.from_config(config)
        model.controller.requires_grad_(False)
        return model

    made = {
        "bayes": Trainer(config, data, device, build_objective=svi_objective),
        "no pyro": Trainer(config, data, device, build_objective=ByHand),
        "softmax": Trainer(config, data, device, build_objective=plain(mean_route)),
        "full": Trainer(alone, data, device, without_controller, plain(only_full)),
    }
    return {name: Rival(trainer, []) for name, trainer in made.items()}


def timed_step(contender: Rival, step: int) -> float:
    """Seconds of one step."""
    trainer = contender.trainer
    if trainer.device.type != "cuda":
        started = time.process_time()
        trainer.step(step)
        return time.process_time() - started
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    trainer.step(step)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    # what the others hold does not count; this one's own weights and moments do. A CUDA graph keeps
    # its memory: the first step, which captures it, is the one that shows the peak
    own = sum(p.numel() * p.element_size() * 3 for p in trainer.model.parameters())
    contender.peak_bytes = max(
        contender.peak_bytes, torch.cuda.max_memory_allocated() - before + own
    )
    return seconds


def measure(contenders: dict[str, Rival], rounds: int, warmup: int) -> None:
    """Take turns; at the steps of the middle of training, where the prior has its price."""
    first = next(iter(contenders.values())).trainer.config.train.steps * 3 // 4
    for turn in range(warmup + rounds):
        order = list(contenders) if turn % 2 else list(contenders)[::-1]
        for name in order:
            seconds = timed_step(contenders[name], first + turn)
            # gradients are dropped, so that the next contender does not carry this one's in its
            # peak
            contenders[name].trainer.optimiser.zero_grad(set_to_none=True)
            if turn >= warmup:
                contenders[name].seconds.append(seconds)


def table(contenders: dict[str, Rival]) -> pd.DataFrame:
    """One row a contender."""
    bayes, rows = contenders["bayes"], []
    config = bayes.trainer.config
    tokens = config.train.batch_size * config.data.context
    for name, contender in contenders.items():
        seconds = torch.tensor(contender.seconds, dtype=torch.float64)
        ratio = torch.tensor(bayes.seconds, dtype=torch.float64) / seconds
        rows.append(
            {
                "contender": name,
                "ms_a_step": 1e3 * float(seconds.median()),
                "tokens_a_second": tokens / float(seconds.median()),
                "bayes_costs": float(ratio.median()),
                "low": float(ratio.quantile(0.25)),
                "high": float(ratio.quantile(0.75)),
                "peak_gib": contender.peak_bytes / 2**30,
            }
        )
    return pd.DataFrame(rows)


def settings(args: argparse.Namespace, device: torch.device) -> Config:
    """The preset `tiny` on a CPU; d_model 512, 8 layers, T 2048 in bfloat16 on a GPU."""
    size = "base" if device.type == "cuda" else "tiny"
    changes: dict[str, Any] = {
        "train.steps": 100_000,
        "train.warmup": 0,
        "train.lr": 1e-5,
        "train.controller_lr": 1e-5,
    }
    changes |= {
        "data.corpus": args.corpus,
        "train.compile": args.compile,
        "train.graph": "on" if args.graph else "off",
        "train.device": str(device),
    }
    if args.batch_size:
        changes["train.batch_size"] = args.batch_size
    if device.type == "cuda":
        changes |= {"data.eval_tokens": 2048}
    return with_changes(preset(size), changes)


def main() -> None:
    """Measure, print, write analysis/results/training_step_DEVICE.csv."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--corpus", default="stdlib", help="any will do: time does not hang on it")
    parser.add_argument(
        "--batch-size", type=int, default=0, help="sequences a step (default: that of the preset)"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="train.compile for all contenders")
    parser.add_argument("--graph", action="store_true", help="train.graph for all contenders")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    config = settings(args, device)
    contenders = build(config, device)
    measure(contenders, args.rounds, args.warmup)
    frame = table(contenders)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    frame["device"], frame["precision"], frame["compiled"] = (
        name,
        config.train.precision,
        args.compile,
    )
    frame["graph"] = args.graph
    frame["d_model"], frame["layers"] = config.model.d_model, config.model.num_layers
    frame["context"], frame["batch_size"], frame["rounds"] = (
        config.data.context,
        config.train.batch_size,
        args.rounds,
    )
    frame["torch"], frame["commit"] = torch.__version__, commit()
    RESULTS.mkdir(exist_ok=True)
    suffix = ("_compiled" if args.compile else "") + ("_graph" if args.graph else "")
    path = RESULTS / f"training_step_{name.lower().replace(' ', '_')}{suffix}.csv"
    frame.to_csv(path, index=False, float_format="%.5g")
    print(frame.iloc[:, :7].to_string(index=False, float_format=lambda x: f"{x:,.3f}"))
    report(frame, device)
    print(f"written: {path}")


def report(frame: pd.DataFrame, device: torch.device) -> None:
    """The figures against what they should be."""
    costs = frame.set_index("contender")["bayes_costs"]
    print(f"time in Pyro: {1 - 1 / costs['no pyro']:.1%} of a Bayesian step")
    for name, goals in GOALS.items():
        goal = goals[device.type]
        verdict = (
            ""
            if goal is None
            else f" (goal: at most {goal}; {'met' if costs[name] <= goal else 'MISSED'})"
        )
        print(f"a Bayesian step costs {costs[name]:.3f}x {name}{verdict}")


if __name__ == "__main__":
    main()
