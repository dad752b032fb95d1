"""A command that reads a fitted patch again, or prints the rows of a reading before."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.pretrained.loading import load_model
from analysis.pretrained.table import lines
from analysis.pretrained.texts import load
from bayes_router.benchmark.rows import Rows
from bayes_router.integrations.patching import load_patch

RowsAt = Callable[[Any, dict[str, Any], argparse.Namespace, float], Iterator[dict[str, Any]]]
"""(router, texts by kind, options, budget) -> rows."""


def command(
    about: str | None,
    results: Path,
    rows: RowsAt,
    summary: Callable[[pd.DataFrame], pd.DataFrame],
    options: Callable[[argparse.ArgumentParser], None],
    budgets: str,
) -> None:
    """`read MODEL TOKENS.npz PATCH --results CSV`, or `table [CSV]`.

    Args:
        about: the description.
        results: the table that is committed.
        rows: what is read at each budget.
        summary: the table that is printed.
        options: adds those of the reading's own.
        budgets: by default, separated by commas.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="do", required=True)
    read = commands.add_parser("read")
    for name in ("model", "tokens"):
        read.add_argument(name, type=Path)
    read.add_argument("patch", help="a folder, or a name that comes with the package")
    read.add_argument("--results", type=Path, required=True)
    read.add_argument("--context", type=int, default=8192)
    read.add_argument("--budgets", default=budgets)
    options(read)
    show = commands.add_parser("table")
    show.add_argument("results", type=Path, nargs="?", default=results)
    args = parser.parse_args()
    if args.do == "read":
        model = load_model(args.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        _, texts = load(args.tokens, model.config.vocab_size)
        router = load_patch(model, args.patch)
        router.full_up_to = 0  # routes are read at every length
        found = Rows(args.results, {"window": router.settings.window})
        for budget in map(float, args.budgets.split(",")):
            for row in rows(router, texts, args, budget):
                found.add(row)
        found.finish()
    print("\n".join(lines(summary(pd.read_csv(args.results)))))
