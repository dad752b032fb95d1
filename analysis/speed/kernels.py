"""Does hard routing save time and memory?

`python -m analysis.speed.kernels [options of bayes-router bench]`.

The benchmark that `bayes-router bench` runs, written to analysis/results. `--jobs N` divides it
among N processes (`--part` of the benchmark), each with a card of its own: it holds the backends
against the reference there, has all of `--seconds`, and their rows are one table. Nothing is
written where one of them fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from analysis.speed.patched_jobs import visible
from bayes_router.benchmark.facts import command_line
from bayes_router.cli import main

RESULTS = Path(__file__).parents[1] / "results"
PROGRAM = (sys.executable, "-m", "analysis.speed.kernels")


def divided(
    jobs: int, asked: Sequence[str], program: Sequence[str] = PROGRAM
) -> tuple[str, pd.DataFrame]:
    """The name of the table, and the rows of every part, the shortest texts first.

    Raises:
        SystemExit: a process failed, or there was no card for it.
    """
    # what shares a card, or the cores of a machine without one, would be timed beside the others
    cards = torch.cuda.device_count()
    if not 1 <= jobs <= max(cards, 1):
        sys.exit(f"--jobs: expected 1 to {max(cards, 1)}, for {cards} cards; got {jobs}")
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for job in range(jobs):
            card = {"CUDA_VISIBLE_DEVICES": visible(job)} if cards else {}
            part = ["--part", f"{job + 1}/{jobs}", "--out", str(Path(folder, str(job)))]
            started.append(
                subprocess.Popen([*program, *asked, *part], env={**os.environ, **card})  # noqa: S603
            )
        failed = [job for job, process in enumerate(started) if process.wait()]
        if failed:
            sys.exit(f"nothing is reported, these jobs failed: {failed}")
        tables = sorted(Path(folder).glob("*/speed_*.csv"))
        rows = pd.concat([pd.read_csv(path) for path in tables], ignore_index=True)
        name = tables[0].name
    rows = rows.sort_values("T", kind="stable", ignore_index=True)
    return name, rows.assign(command=command_line())


def own(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and those of the benchmark."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_known_args(arguments)


def run(arguments: Sequence[str]) -> None:
    """With `--jobs` the divided benchmark, and else `bayes-router bench`."""
    asked, rest = own(arguments)
    if asked.jobs is None:
        sys.exit(main(["bench", "--out", str(asked.out), *rest]))
    name, table = divided(asked.jobs, rest)
    from bayes_router.benchmark.figure import draw

    asked.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(asked.out / name, index=False)
    draw(table, (asked.out / name).with_suffix(".png"))
    print(f"written to {asked.out / name} and .png")


if __name__ == "__main__":
    run(sys.argv[1:])
