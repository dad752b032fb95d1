"""Does hard routing save time and memory?

`python -m analysis.speed.kernels [options of bayes-router bench]`.

The benchmark that `bayes-router bench` runs, written to analysis/results. `--jobs N` divides the
`--lengths` among N processes, each with a card of its own: it holds the backends against the
reference there, has all of `--seconds`, and their rows are one table. Nothing is written where one
of them fails.
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
    jobs: int, lengths: Sequence[str], rest: Sequence[str], program: Sequence[str] = PROGRAM
) -> tuple[str, pd.DataFrame]:
    """The name of the table, and the rows of every length, in this order of the lengths.

    Raises:
        SystemExit: a process failed, or there was no length or no card for it.
    """
    cards = torch.cuda.device_count()
    # what shares a card, or the cores of a machine without one, would be timed beside the others
    most = min(len(lengths), max(cards, 1))
    if not 1 <= jobs <= most:
        sys.exit(
            f"--jobs: expected 1 to {most}, for {len(lengths)} --lengths and {cards} cards; got "
            f"{jobs}"
        )
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for job in range(jobs):
            card = {"CUDA_VISIBLE_DEVICES": visible(job)} if cards else {}
            out = ["--out", str(Path(folder, str(job))), "--lengths", *lengths[job::jobs]]
            started.append(
                subprocess.Popen([*program, *rest, *out], env={**os.environ, **card})  # noqa: S603
            )
        failed = [job for job, process in enumerate(started) if process.wait()]
        if failed:
            sys.exit(f"nothing is reported, these jobs failed: {failed}")
        tables = sorted(Path(folder).glob("*/speed_*.csv"))
        rows = pd.concat([pd.read_csv(path) for path in tables], ignore_index=True)
        name = tables[0].name
    order = {int(length): place for place, length in enumerate(lengths)}
    rows = rows.sort_values("T", key=lambda T: T.map(order), kind="stable", ignore_index=True)
    return name, rows.assign(command=command_line())


def run(arguments: Sequence[str]) -> None:
    """With `--jobs` the divided benchmark, and else `bayes-router bench`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--lengths", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked, rest = parser.parse_known_args(arguments)
    if asked.jobs is None:
        sys.exit(main(["bench", "--out", str(RESULTS), *arguments]))
    name, table = divided(asked.jobs, asked.lengths, rest)
    from bayes_router.benchmark.figure import draw

    asked.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(asked.out / name, index=False)
    draw(table, (asked.out / name).with_suffix(".png"))
    print(f"written to {asked.out / name} and .png")


if __name__ == "__main__":
    run(sys.argv[1:])
