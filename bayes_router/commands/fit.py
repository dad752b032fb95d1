"""`bayes-router fit`: fit a routed Transformer on a corpus and write a run folder."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser
from bayes_router.config import Config, config_from_dict, load_config
from bayes_router.diagnostics.figures.run import draw_run
from bayes_router.presets import PRESETS, preset
from bayes_router.training.checkpoint import CONFIG, require_file
from bayes_router.training.evaluate import Evaluation
from bayes_router.training.fit import fit

HELP = "fit a routed Transformer on a corpus and write a run folder"
SHORT = {"corpus": "data.corpus", "steps": "train.steps", "seed": "train.seed", "device": "train.device"}


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `fit`: the usual ones, and every field of the configuration as `--section.field`."""
    result = Parser(description="Fit a routed Transformer by SVI and write a run folder.")
    result.add_argument("--preset", type=str, default="tiny", help=f"settings to start from: {', '.join(PRESETS)}")
    result.add_argument("--config", type=Optional[Path], default=None, help="TOML file of settings, over the preset")
    result.add_argument("--out", type=Optional[Path], default=None, help="run folder to write (default: runs/PRESET)")
    result.add_argument(
        "--corpus", type=Optional[str], default=None, help="sotu, text:PATH, stdlib, recall, hf:NAME (data.corpus)"
    )
    result.add_argument("--steps", type=Optional[int], default=None, help="optimiser steps (train.steps)")
    result.add_argument("--seed", type=Optional[int], default=None, help="of weights, batches and draws (train.seed)")
    result.add_argument("--device", type=Optional[str], default=None, help="auto, cpu, cuda (train.device)")
    result.add_argument("--overwrite", action="store_true", help="replace an existing run")
    result.add_argument("--resume", action="store_true", help="continue an existing run from its last checkpoint")
    result.add_argument("--quiet", action="store_true", help="no progress bar, no line an evaluation")
    result.add_class_arguments(Config, None)
    result.set_defaults(_flat(starting_config(arguments)))
    return result


def starting_config(arguments: Sequence[str]) -> Config:
    """The settings before command-line overrides: a resumed run's own, else the preset and then the TOML file."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    for option in ("--config", "--out"):
        first.add_argument(option, type=Path)
    first.add_argument("--resume", action="store_true")
    if not arguments or arguments[0] != "fit":
        return Config()
    try:
        known = first.parse_known_args(arguments[1:])[0]
    except SystemExit:
        raise ValueError("--preset, --config, --out: expected a value after each") from None
    if known.resume and known.config is None:
        return load_config(require_file(known.out or Path("runs") / known.preset, CONFIG))
    config = preset(known.preset)
    return config if known.config is None else load_config(known.config, config)


def _flat(config: Config) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, table in asdict(config).items() for key, value in table.items()}


def run(options: Namespace) -> None:
    """Fit, draw, print the table and where the run is."""
    values = {section: vars(options[section]) for section in asdict(Config())}
    for short, dotted in SHORT.items():
        if options[short] is not None:
            section, key = dotted.split(".")
            values[section][key] = options[short]
    config = config_from_dict(values)
    out = options.out or Path("runs") / options.preset
    _, summary = fit(config, out, overwrite=options.overwrite, resume=options.resume, progress=not options.quiet)
    if not summary:  # another rank than 0
        return
    draw_run(out)
    print_summary(summary)
    print(f"\nrun folder: {out}")


def print_summary(summary: dict[str, Any]) -> None:
    """The table of a finished fit."""
    fields = {key: summary[key] for key in Evaluation.__dataclass_fields__}
    print(
        f"{summary['parameters']:,} parameters, {summary['steps']} steps, {summary['tokens_seen']:,} tokens of "
        f"{summary['corpus']['name']} in {summary['seconds']:.0f} s on {summary['device']}"
    )
    print(Evaluation(**fields).table())
