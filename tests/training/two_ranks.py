"""Run by torchrun in test_distributed.py.

Trains on every rank and writes what each saw to OUT/rank_N.json.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from bayes_router.config import Config, load_config, with_changes
from bayes_router.data.load import load_data
from bayes_router.training.distributed import World, connected
from bayes_router.training.evaluate import Evaluation
from bayes_router.training.faults import Interrupted
from bayes_router.training.fit import fit
from bayes_router.training.trainer import Trainer
from bayes_router.transformer.model import RoutedLanguageModel

SHORT = {"train.steps": 6, "train.eval_every": 3, "train.checkpoint_every": 3}
SHORT |= {"data.eval_tokens": 64}


def build_double(config: Config) -> RoutedLanguageModel:
    return RoutedLanguageModel.from_config(config).double()


def losses(config: Config, world: World, steps: int = 20) -> dict[str, list[float]]:
    """The loss of each step, mean over ranks and on this one, in float64.

    And a weight at the end.
    """
    config, data = load_data(config)
    trainer = Trainer(config, data, torch.device("cpu"), build_double, world=world)
    mean, own = [], []
    for step in range(steps):
        terms, _ = trainer.step(step)
        own.append(float(terms.elbo))
        mean.append(float(world.mean(terms.elbo)))
    weight = trainer.whole().network.blocks[0].attention.qkv.weight.detach()
    return {"mean": mean, "own": own, "weight": weight.flatten()[:50].tolist()}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    config = load_config(out / "settings.toml")
    with connected(torch.device("cpu")) as world:
        result = {
            "row": losses(config, world),
            "row, accumulated": losses(with_changes(config, {"train.accumulate": 2}), world),
            "batch": losses(with_changes(config, {"train.draws": "batch"}), world),
            "batch again": losses(with_changes(config, {"train.draws": "batch"}), world),
            "poisoned": poisoned(config, world),
            "poisoned, sharded": poisoned(with_changes(config, {"train.shard": True}), world),
            "sharded": losses(with_changes(config, {"train.shard": True}), world, 8),
            "sharded, accumulated": losses(
                with_changes(config, {"train.shard": True, "train.accumulate": 2}), world, 8
            ),
        }
        runs(config, out)
    (out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))


def runs(config: Config, out: Path) -> None:
    """The folders of a fit with copies, of one that is cut, and of one that is stopped.

    All in the group that is there.
    """
    short = with_changes(config, SHORT)
    cut = with_changes(short, {"train.shard": True})
    fit(short, out / "copies", progress=False)
    fit(cut, out / "cut", progress=False)
    try:
        fit(cut, out / "stopped", progress=False, on_evaluation=stop)
    except Interrupted:
        if os.environ["RANK"] == "0":
            shutil.copytree(out / "stopped", out / "half")
        fit(cut, out / "stopped", resume=True, progress=False)


def stop(step: int, evaluation: Evaluation) -> None:
    """What a scheduler does to rank 0, at its first evaluation."""
    os.kill(os.getpid(), signal.SIGTERM)


def poisoned(config: Config, world: World) -> dict[str, list[float]]:
    """Rank 1 alone meets a gradient that is not finite: both skip the step."""
    config, data = load_data(config)
    trainer = Trainer(config, data, torch.device("cpu"), world=world)

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (float("nan") if world.rank == 1 else 1.0)

    trainer.step(0)
    before = trainer.whole().network.embed.weight.detach().clone()
    # of what the weight makes: a cut parameter itself is not what is differentiated
    up = trainer.model.network.blocks[0].up
    handle = up.register_forward_hook(lambda *made: (made[-1].register_hook(hook), None)[1])
    trainer.step(1)
    handle.remove()
    kept = torch.equal(before, trainer.whole().network.embed.weight)
    trainer.step(2)
    moved = not torch.equal(before, trainer.whole().network.embed.weight)
    return {
        "kept": [float(kept)],
        "moved": [float(moved)],
        "skipped": [float(trainer.guard.skipped)],
    }


if __name__ == "__main__":
    main()
