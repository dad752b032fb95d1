"""The run folder.

config.toml, metrics.csv, summary.json, model.safetensors (to use), state.pt (to resume), figures/.

Every file is written under a temporary name and renamed, so that each is whole or absent. state.pt
alone holds all that a resumed run needs, weights included: a run killed between two files resumes
from one consistent step. state.pt ends with a SHA-256 of what stands before it, model.safetensors
names that of its tensors (`transformer/saving.py`); both hold the settings too, under the same
sum: a flipped bit is found in any of the three, not trained on.
"""

import hashlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
import torch

from bayes_router.checks import require
from bayes_router.config import Config, load_config
from bayes_router.files import (
    CONFIG,
    PRETRAINED,
    STATE,
    WEIGHTS,
    require_file,
    write_json,
    write_text,
    write_whole,
)
from bayes_router.routing.saving import load_evidence, load_risk
from bayes_router.training.faults import sole_user
from bayes_router.training.sharding import load_whole
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.pretrained import config_json, read_summary
from bayes_router.transformer.saving import (
    check_finite,
    damage_named,
    fill,
    other_version,
    read_settings_beside,
    read_weights,
    save_weights,
    settings_in,
)

DIGEST_BYTES = 32
FREE = ("data.corpus", "data.prepared", "train.device", "train.shard")
"""Settings that may change behind a run: where its text lies now, what computes, and on how many
processes."""
LOWERED = ("train.lr", "train.controller_lr")
"""Settings that a resumed run may be given anew, lower than before: it diverged."""


def lowered(before: Config, config: Config) -> set[str]:
    """Learning rates of `config` that are lower than those of a run before."""
    found = _differing(before, config)
    return {name for name in LOWERED if name in found and found[name][1] < found[name][0]}


def prepare_run(out: Path, config: Config, overwrite: bool, resume: bool) -> None:
    """Make the run folder, or check that it may be resumed.

    With its own settings, or with lower learning rates.

    Raises:
        ValueError: the folder exists and neither `overwrite` nor `resume` is set; or `resume` is
            set and there is nothing to resume, or the run was made with other settings (the message
            names them).
    """
    if resume and overwrite:
        raise ValueError(
            "overwrite: expected it without resume; got both; resume goes on with the run, "
            "overwrite takes its place"
        )
    if resume:
        before = load_config(require_file(out, CONFIG))
        slower, found = lowered(before, config), _differing(before, config)
        differing = [
            f"{name} (run {theirs!r}, now {ours!r})"
            for name, (theirs, ours) in found.items()
            if name not in slower and name != "train.shard"
        ]
        if differing:
            raise ValueError(
                f"resume: expected the settings that {out} was made with, or lower learning rates; "
                f"these differ: {', '.join(differing)}"
            )
        require_file(out, STATE)
        for left in out.glob(".*.tmp"):  # by a run that was killed while it wrote
            left.unlink()
        return
    if out.exists():
        if not overwrite:
            raise ValueError(
                f"out: expected a new folder; {out} exists; choose another, or give --overwrite or "
                f"--resume"
            )
        foreign = out.is_dir() and any(path.suffix != ".tmp" for path in out.iterdir())
        if foreign and not (out / CONFIG).exists():
            raise ValueError(
                f"out: expected a run folder to overwrite; {out} holds other files; choose another"
            )
        if not out.is_dir():
            raise ValueError(f"out: expected a folder; {out} is a file; choose another path")
        with sole_user(out):
            shutil.rmtree(out)
    try:
        out.mkdir(parents=True)
        write_text(out / CONFIG, config.to_toml())
    except OSError as error:
        raise ValueError(
            f"out: expected a folder that can be made; got {out}: {error.strerror}; choose another"
        ) from error


def _differing(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The settings, as section.field, that are not the same in both, with their two values."""
    a, b = one.to_dict(), other.to_dict()
    pairs = {
        f"{section}.{key}": (a[section].get(key), b[section].get(key))
        for section in a
        for key in sorted({*a[section], *b[section]})
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _check_settings(
    path: Path, config: Config, stored: Config, asked: Config | None = None
) -> None:
    """Compare config.toml with the settings that weights say they were made with.

    The file at `path` was read as `config`.

    A learning rate that is lowered as the run is resumed stands in the weights before it stands in
    the file.
    """
    slower = set() if asked is None else lowered(config, asked)
    found = {
        name: pair
        for name, pair in _differing(stored, config).items()
        if name not in FREE
        and not (name in slower and name not in _differing(stored, asked or config))
    }
    if found:
        words = ", ".join(f"{name} is {now!r}, was {then!r}" for name, (then, now) in found.items())
        raise ValueError(
            f"{path}: expected the settings that the weights were made with; {words}; put back "
            f"what it was"
        )


def save_checkpoint(
    run: Path,
    model: RoutedLanguageModel,
    moments: Mapping[str, Any],
    progress: Mapping[str, Any],
    config: Config,
) -> None:
    """Write state.pt, then model.safetensors, each with the settings.

    `moments` is the state of the optimiser; it and the model are whole.
    """
    settings = bound_settings(config)
    state = {
        "progress": dict(progress),
        "settings": settings,
        "model": model.state_dict(),
        "optimiser": dict(moments),
    }

    def write(path: Path) -> None:
        torch.save(state, path)
        digest = _sha256_of_file(path)
        with open(path, "ab") as file:
            file.write(digest)

    write_whole(run / STATE, write)
    write_json(run / PRETRAINED, config_json(model.config, model.policy))
    save_weights(run, model, settings)


def _sha256_of_file(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def bound_settings(config: Config) -> str:
    """The settings that are kept beside weights, as TOML.

    All but those that may change behind a run.
    """
    tables = config.to_dict()
    for name in FREE:
        section, key = name.split(".")
        tables[section].pop(key, None)
    return tomli_w.dumps(tables)


def check_bound(run: Path, asked: Config | None = None) -> None:
    """Compare config.toml with the settings beside the weights of a run.

    This comes before a model of the size that it claims is built.

    What cannot be read here is left to `load_checkpoint`, which names the damage.
    """
    if not ((run / CONFIG).is_file() and (run / WEIGHTS).is_file()):
        return
    stored = read_settings_beside(run / WEIGHTS)
    if stored is not None:
        _check_settings(run / CONFIG, load_config(run / CONFIG), stored, asked)


def load_checkpoint(
    run: Path,
    model: RoutedLanguageModel,
    optimiser: torch.optim.Optimizer,
    steps: int,
    asked: Config | None = None,
) -> dict[str, Any]:
    """Restore `model` and `optimiser` from state.pt.

    Returns the progress saved with them, at most `steps` steps.

    `asked` are the settings that the run is resumed with, where learning rates may be lower than
    its own.

    Raises:
        ValueError: the file is damaged or fits another model. Nothing in it is executed: only
            tensors and plain values load.
    """
    path = require_file(run, STATE)
    with damage_named(path, "a checkpoint of this model"):
        content = path.read_bytes()
        payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        require(
            hashlib.sha256(payload).digest() == digest, "checksum", "that of the content", "another"
        )
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        progress, stored = _checked_progress(state["progress"], steps), settings_in(state)
    if stored is not None:
        _check_settings(run / CONFIG, load_config(require_file(run, CONFIG)), stored, asked)
    with damage_named(path, "a checkpoint of this model"):
        check_finite(state["model"])
        for group in state["optimiser"]["param_groups"]:
            # of this device, whatever device wrote the file
            group["fused"] = optimiser.defaults["fused"]
        load_whole(model, optimiser, state["model"], state["optimiser"])
        _check_moments(optimiser)
    return progress


def _checked_progress(progress: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The counters of a checkpoint, which must be numbers within their range."""
    for name in ("step", "skipped", "in_a_row"):
        value = progress[name]
        require(
            type(value) is int and 0 <= value <= steps, name, f"an integer from 0 to {steps}", value
        )
    seconds = progress["seconds"]
    require(
        isinstance(seconds, (int, float)) and 0 <= seconds < float("inf"),
        "seconds",
        "0 or more",
        seconds,
    )
    return dict(progress)


def _check_moments(optimiser: torch.optim.Optimizer) -> None:
    """The optimiser takes any state that it is given.

    Here it must have the shapes of the parameters.
    """
    for parameter, state in optimiser.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            require(
                state[name].shape == parameter.shape,
                name,
                f"shape {tuple(parameter.shape)}",
                tuple(state[name].shape),
            )


def load_run(run: Path | str, device: str = "cpu") -> tuple[Config, RoutedLanguageModel]:
    """The settings and the fitted model of a run folder, in evaluation mode.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    run = Path(run)
    settings, path = require_file(run, CONFIG), require_file(run, WEIGHTS)
    try:
        config = load_config(settings)
    except ValueError as error:
        raise ValueError(f"{error}{other_version(run)}") from error
    weights, stored = read_weights(path)
    if stored is not None:
        _check_settings(run / CONFIG, config, stored)
    model: RoutedLanguageModel = fill(RoutedLanguageModel, config.model, weights, path)
    model.controller.evidence = load_evidence(run, config.model.num_layers, config.model.d_model)
    model.controller.risk = load_risk(run)
    model.summary = read_summary(run)
    return config, model.to(device).eval()
