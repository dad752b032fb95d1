"""Resident memory while training on a corpus larger than memory allows.

`python -m analysis.speed.streaming_memory --gigabytes 8`.

Writes text of that size, prepares it, trains on it, and reads the resident memory of the process
all along. The tiny preset cut down: what is measured is the data, not the network.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import psutil
import torch

from bayes_router.config import Config, with_changes
from bayes_router.data.load import load_data
from bayes_router.presets import preset
from bayes_router.training.trainer import Trainer

RESULTS = Path(__file__).parents[1] / "results" / "streaming_memory.csv"


def write_text(path: Path, size: int) -> None:
    """Lines of random words, `size` bytes: 64 MiB of them, shifted each time."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, size=1 << 26, dtype=np.uint8)
    letters[rng.integers(0, len(letters), size=len(letters) // 6)] = 32
    letters[rng.integers(0, len(letters), size=len(letters) // 70)] = 10
    with open(path, "wb") as file:
        written = 0
        while written < size:
            block = np.roll(letters, int(rng.integers(len(letters))))[: size - written]
            file.write(block.tobytes())
            written += len(block)


def resident() -> float:
    """GiB of this process that lie in memory, mapped files included."""
    return psutil.Process().memory_info().rss / 2**30


def settings(text: Path, prepared: Path) -> Config:
    """A network that takes milliseconds a step, batches that touch many places of the file."""
    changes = {
        "model.d_model": 32,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "train.steps": 1_000_000,
    }
    changes |= {
        "data.corpus": f"text:{text}",
        "data.prepared": str(prepared),
        "data.eval_tokens": 4096,
        "data.context": 64,
    }
    changes |= {"model.experts": ("local", "linear"), "prior.cost_ratio": (0.3, 0.15)}
    return with_changes(preset("tiny"), {**changes, "train.batch_size": 64, "train.device": "cpu"})


def main() -> None:
    """Measure, print, write analysis/results/streaming_memory.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="with room for twice the size (default: a temporary one)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, float | str]] = []

    def note(stage: str, seconds: float) -> None:
        rows.append(
            {"stage": stage, "seconds": round(seconds, 1), "resident_gib": round(resident(), 3)}
        )
        print(rows[-1], flush=True)

    with TemporaryDirectory(dir=args.folder) as folder:
        text, size = Path(folder) / "text.txt", int(args.gigabytes * 1e9)
        write_text(text, size)
        note("text written", 0.0)
        for stage in ("prepared", "opened again"):
            started = time.perf_counter()
            config, data = load_data(settings(text, Path(folder) / "prepared"))
            note(stage, time.perf_counter() - started)
        trainer, started = Trainer(config, data, torch.device("cpu")), time.perf_counter()
        for step in range(args.steps):
            trainer.step(step)
            if (step + 1) % (args.steps // 5) == 0:
                note(f"step {step + 1}", time.perf_counter() - started)
    frame = pd.DataFrame(rows)
    frame["corpus_bytes"], frame["peak_gib"] = size, round(peak(), 3)
    RESULTS.parent.mkdir(exist_ok=True)
    frame.to_csv(RESULTS, index=False)
    print(
        f"{data.tokens:,} tokens of training text; peak resident memory {peak():.2f} GiB; written: "
        f"{RESULTS}"
    )


def peak() -> float:
    """GiB that lay in memory at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
