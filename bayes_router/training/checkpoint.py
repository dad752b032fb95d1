"""The run folder: config.toml, metrics.csv, summary.json, model.safetensors (to use), state.pt (to resume), figures/.

Every file is written under a temporary name and renamed, so that each is whole or absent. state.pt alone holds all that a
resumed run needs, weights included: a run killed between two files resumes from one consistent step.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bayes_router.config import Config, load_config
from bayes_router.transformer.model import RoutedLanguageModel

CONFIG, METRICS, SUMMARY, WEIGHTS, STATE = "config.toml", "metrics.csv", "summary.json", "model.safetensors", "state.pt"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file beside `path`, then rename it: a reader sees the old file or the new, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def prepare_run(out: Path, config: Config, overwrite: bool, resume: bool) -> None:
    """Make the run folder, or check that it may be resumed.

    Raises:
        ValueError: the folder exists and neither `overwrite` nor `resume` is set; or `resume` is set and there is nothing
            to resume, or the run was made with other settings (the message names them).
    """
    if resume:
        theirs = load_config(require_file(out, CONFIG)).to_dict()
        ours = config.to_dict()
        differing = [
            f"{section}.{key} (run {theirs[section].get(key)!r}, now {ours[section].get(key)!r})"
            for section in ours
            for key in sorted({*ours[section], *theirs[section]})
            if ours[section].get(key) != theirs[section].get(key)
        ]
        if differing:
            raise ValueError(f"resume: expected the settings that {out} was made with; these differ: {', '.join(differing)}")
        require_file(out, STATE)
        return
    if out.exists():
        if not overwrite:
            raise ValueError(f"out: expected a new folder; {out} exists; choose another, or give --overwrite or --resume")
        if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).exists():
            raise ValueError(f"out: expected a run folder to overwrite; {out} holds other files; choose another")
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    out.mkdir(parents=True)
    write_text(out / CONFIG, config.to_toml())


def require_file(run: Path, name: str) -> Path:
    """The path of a file of a run, which must be there."""
    if not run.is_dir():
        raise ValueError(f"run: expected a run folder; {run} does not exist; make one with `bayes-router fit --out {run}`")
    if not (run / name).is_file():
        raise ValueError(f"run: expected {name} in {run}; it is missing: not a run folder, or a run that never got so far")
    return run / name


def save_checkpoint(
    run: Path, model: RoutedLanguageModel, optimiser: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write state.pt, then model.safetensors."""
    state = {"progress": dict(progress), "model": model.state_dict(), "optimiser": optimiser.state_dict()}
    write_whole(run / STATE, lambda p: torch.save(state, p))
    save_weights(run, model)


def save_weights(run: Path, model: nn.Module) -> None:
    """Write model.safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(run / WEIGHTS, lambda p: save_file(weights, p))


def load_checkpoint(run: Path, model: RoutedLanguageModel, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore `model` and `optimiser` from state.pt; returns the progress saved with them.

    Raises:
        ValueError: the file is damaged or fits another model. Nothing in it is executed: only tensors and plain values load.
    """
    path = require_file(run, STATE)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        return dict(state["progress"])
    except (RuntimeError, KeyError, EOFError, ValueError, TypeError, AttributeError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: expected a checkpoint of this model; it is damaged or another's: {_first_line(error)}"
        ) from error


def load_run(run: Path | str, device: str = "cpu") -> tuple[Config, RoutedLanguageModel]:
    """The settings and the fitted model of a run folder, in evaluation mode.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    run = Path(run)
    config = load_config(require_file(run, CONFIG))
    path = require_file(run, WEIGHTS)
    model = RoutedLanguageModel.from_config(config)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{path}: expected the weights of the model in {CONFIG}; damaged or another's: {_first_line(error)}"
        ) from error
    return config, model.to(device).eval()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
