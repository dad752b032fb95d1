"""The run folder.

config.toml, metrics.csv, summary.json, model.safetensors (to use), state.pt (to resume), figures/.

Every file is written under a temporary name and renamed, so that each is whole or absent. state.pt
alone holds all that a resumed run needs, weights included: a run killed between two files resumes
from one consistent step. state.pt ends with a SHA-256 of what stands before it, model.safetensors
names that of its tensors; both hold the settings too, under the same
sum: a flipped bit is found in any of the three, not trained on.
"""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_router import __version__
from bayes_router.checks import require
from bayes_router.config import Config, config_from_toml, load_config
from bayes_router.files import (
    CONFIG,
    STATE,
    WEIGHTS,
    first_line,
    require_file,
    write_text,
    write_whole,
)
from bayes_router.training.evidence import load_evidence
from bayes_router.training.faults import sole_user
from bayes_router.training.risk import load_risk
from bayes_router.transformer.model import RoutedLanguageModel

DIGEST_BYTES = 32
FREE = ("data.corpus", "data.prepared", "train.device")
"""Settings that may change behind a run: where its text lies now, and what computes."""
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
    if resume:
        before = load_config(require_file(out, CONFIG))
        slower, found = lowered(before, config), _differing(before, config)
        differing = [
            f"{name} (run {theirs!r}, now {ours!r})"
            for name, (theirs, ours) in found.items()
            if name not in slower
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
        if out.is_dir():
            with sole_user(out):
                shutil.rmtree(out)
        else:
            out.unlink()
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
    optimiser: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    config: Config,
) -> None:
    """Write state.pt, then model.safetensors, each with the settings."""
    settings = bound_settings(config)
    state = {
        "progress": dict(progress),
        "settings": settings,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }

    def write(path: Path) -> None:
        torch.save(state, path)
        digest = _sha256_of_file(path)
        with open(path, "ab") as file:
            file.write(digest)

    write_whole(run / STATE, write)
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
    try:
        with safe_open(run / WEIGHTS, framework="pt") as file:
            stored = _settings_in(_table_of(file.metadata() or {}))
    except (*DAMAGE, SafetensorError):
        return
    if stored is not None:
        _check_settings(run / CONFIG, load_config(run / CONFIG), stored, asked)


def save_weights(run: Path, model: nn.Module, settings: str) -> None:
    """Write model.safetensors, with `bound_settings` of what the model was made with."""
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    table = {
        "sha256": weights_digest(weights, settings + __version__),
        "settings": settings,
        "version": __version__,
    }
    # one entry: the order of several is another in each process
    metadata = {"run": json.dumps(table)}
    write_whole(run / WEIGHTS, lambda p: save_file(weights, p, metadata))


def weights_digest(weights: Mapping[str, Tensor], words: str = "") -> str:
    """SHA-256 over settings and version, and over tensors on the CPU.

    Of tensors it takes names, types, shapes and bytes.
    """
    digest = hashlib.sha256(words.encode())
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    with _damage_named(path, "a checkpoint of this model"):
        content = path.read_bytes()
        payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        require(
            hashlib.sha256(payload).digest() == digest, "checksum", "that of the content", "another"
        )
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        progress, stored = _checked_progress(state["progress"], steps), _settings_in(state)
    if stored is not None:
        _check_settings(run / CONFIG, load_config(require_file(run, CONFIG)), stored, asked)
    with _damage_named(path, "a checkpoint of this model"):
        _check_finite(state["model"])
        model.load_state_dict(state["model"])
        for group in state["optimiser"]["param_groups"]:
            # of this device, whatever device wrote the file
            group["fused"] = optimiser.defaults["fused"]
        optimiser.load_state_dict(state["optimiser"])
        _check_moments(optimiser)
    return progress


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    """Weights that are no numbers give text and figures that are none."""
    for name, tensor in weights.items():
        require(
            bool(torch.isfinite(tensor).all()),
            name,
            "numbers",
            "NaN or infinity",
            "take an earlier copy, or fit again",
        )


DAMAGE = (
    RuntimeError,
    LookupError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
    OverflowError,
    MemoryError,
)
"""What readers raise on files that nobody meant to write."""


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
        raise ValueError(f"{error}{_other_version(run)}") from error
    with _damage_named(path):
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}  # other writers of safetensors leave none
        table = _table_of(metadata)
        if metadata:
            wanted = weights_digest(weights, table.get("settings", "") + table.get("version", ""))
            require(
                table.get("sha256") == wanted,
                "checksum",
                "that of the tensors",
                table.get("sha256"),
            )
        stored = _settings_in(table)
    if stored is not None:
        _check_settings(run / CONFIG, config, stored)
    with _damage_named(path):
        _check_shapes(config, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        _check_finite(weights)
        model = RoutedLanguageModel.from_config(config)
        model.load_state_dict(weights)
    model.controller.evidence = load_evidence(run, config.model.num_layers, config.model.d_model)
    model.controller.risk = load_risk(run)
    return config, model.to(device).eval()


@contextmanager
def _damage_named(
    path: Path, expected: str = f"the weights of the model in {CONFIG}"
) -> Iterator[None]:
    try:
        yield
    except (*DAMAGE, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: expected {expected}; damaged or another's: "
            f"{first_line(error)}{_other_version(path.parent)}"
        ) from error


def _other_version(run: Path) -> str:
    """By which other version a run was written, as the end of a message."""
    try:
        with safe_open(run / WEIGHTS, framework="pt") as file:
            version = str(_table_of(file.metadata() or {}).get("version", __version__))
    except (*DAMAGE, SafetensorError):
        return ""
    return (
        ""
        if version == __version__
        else f"; bayes-router {version} wrote this run, this is {__version__}"
    )


def _table_of(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What model.safetensors says of its tensors.

    Files of before have the checksum alone, as an entry of its own.
    """
    table = json.loads(metadata["run"]) if "run" in metadata else metadata
    require(isinstance(table, Mapping), "run", "a table", table)
    return dict(table)


def _settings_in(table: Mapping[str, Any]) -> Config | None:
    """The settings that weights were made with; None in files of before, and of other programs."""
    text = table.get("settings")
    require(text is None or isinstance(text, str), "settings", "a text", text)
    return None if text is None else config_from_toml(str(text))


def _check_shapes(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare settings with stored shapes.

    This comes before a model of the size that the settings claim is built.
    """
    model = config.model
    layers = {name.split(".")[2] for name in shapes if name.startswith("network.blocks.")}
    require(
        layers == set(map(str, range(len(layers)))) and len(layers) == model.num_layers,
        "layers",
        str(len(layers)),
        model.num_layers,
    )
    with torch.device("meta"):
        wanted = RoutedLanguageModel(model).state_dict()
    require(
        set(wanted) == set(shapes),
        "names",
        "those of the model",
        sorted(set(wanted) ^ set(shapes))[:3],
    )
    for name, tensor in wanted.items():
        require(tuple(tensor.shape) == shapes[name], name, str(tuple(tensor.shape)), shapes[name])
