"""Train on two GPUs, or on two processes of a CPU: data parallel, rank 0 writes the run.

Run it: `torchrun --nproc-per-node 2 examples/two_processes.py runs/two [STEPS [CORPUS]]`. Without
torchrun it is one process; since each row draws from a stream of its own, the losses are the same
up to rounding.
"""

import sys
from pathlib import Path

from bayes_router import fit, preset
from bayes_router.config import with_changes


def main(out, steps=100, corpus="stdlib"):
    """Fit the preset `tiny`; the summary on rank 0, nothing on the others."""
    settings = {"data.corpus": corpus, "train.steps": int(steps), "train.draws": "row"}
    settings |= {"train.warmup": min(50, int(steps)), "data.eval_tokens": 4096}
    _, summary = fit(with_changes(preset("tiny"), settings), Path(out), progress=False)
    if summary:
        nll = summary["nll"]["hard"]
        print(
            f"{summary['processes']} processes, {summary['steps']} steps, HARD {nll:.4f} nats per "
            f"byte"
        )
    return summary


if __name__ == "__main__":
    main(*sys.argv[1:])
