"""The run folder: config.toml, metrics.csv, summary.json, model.safetensors (to use), state.pt (to resume), figures/.

Every file is written under a temporary name and renamed, so that each is whole or absent. state.pt alone holds all that a
resumed run needs, weights included: a run killed between two files resumes from one consistent step. state.pt ends with a
SHA-256 of what stands before it, model.safetensors names that of its tensors: a flipped bit is found, not trained on.
"""

import hashlib
import io
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.config import Config, load_config
from bayes_router.files import CONFIG, STATE, WEIGHTS, first_line, require_file, write_text, write_whole
from bayes_router.training.faults import sole_user
from bayes_router.transformer.model import RoutedLanguageModel

DIGEST_BYTES = 32


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
        for left in out.glob(".*.tmp"):  # by a run that was killed while it wrote
            left.unlink()
        return
    if out.exists():
        if not overwrite:
            raise ValueError(f"out: expected a new folder; {out} exists; choose another, or give --overwrite or --resume")
        foreign = out.is_dir() and any(path.suffix != ".tmp" for path in out.iterdir())
        if foreign and not (out / CONFIG).exists():
            raise ValueError(f"out: expected a run folder to overwrite; {out} holds other files; choose another")
        if out.is_dir():
            with sole_user(out):
                shutil.rmtree(out)
        else:
            out.unlink()
    try:
        out.mkdir(parents=True)
        write_text(out / CONFIG, config.to_toml())
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be made; got {out}: {error.strerror}; choose another") from error


def save_checkpoint(
    run: Path, model: RoutedLanguageModel, optimiser: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write state.pt, then model.safetensors."""
    state = {"progress": dict(progress), "model": model.state_dict(), "optimiser": optimiser.state_dict()}

    def write(path: Path) -> None:
        torch.save(state, path)
        digest = _sha256_of_file(path)
        with open(path, "ab") as file:
            file.write(digest)

    write_whole(run / STATE, write)
    save_weights(run, model)


def _sha256_of_file(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def save_weights(run: Path, model: nn.Module) -> None:
    """Write model.safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(run / WEIGHTS, lambda p: save_file(weights, p, {"sha256": weights_digest(weights)}))


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(run: Path, model: RoutedLanguageModel, optimiser: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    """Restore `model` and `optimiser` from state.pt; returns the progress saved with them, at most `steps` steps.

    Raises:
        ValueError: the file is damaged or fits another model. Nothing in it is executed: only tensors and plain values load.
    """
    path = require_file(run, STATE)
    try:
        content = path.read_bytes()
        payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        require(hashlib.sha256(payload).digest() == digest, "checksum", "that of the content", "another")
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        progress = _checked_progress(state["progress"], steps)
        model.load_state_dict(state["model"])
        for group in state["optimiser"]["param_groups"]:
            group["fused"] = optimiser.defaults["fused"]  # of this device, whatever device wrote the file
        optimiser.load_state_dict(state["optimiser"])
        _check_moments(optimiser)
        return progress
    except (*DAMAGE, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: expected a checkpoint of this model; it is damaged or another's: {first_line(error)}"
        ) from error


DAMAGE = (RuntimeError, LookupError, EOFError, ValueError, TypeError, AttributeError, OSError, OverflowError, MemoryError)
"""What readers raise on files that nobody meant to write."""


def _checked_progress(progress: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The counters of a checkpoint, which must be numbers within their range."""
    for name in ("step", "skipped", "in_a_row"):
        value = progress[name]
        require(type(value) is int and 0 <= value <= steps, name, f"an integer from 0 to {steps}", value)
    seconds = progress["seconds"]
    require(isinstance(seconds, (int, float)) and 0 <= seconds < float("inf"), "seconds", "0 or more", seconds)
    return dict(progress)


def _check_moments(optimiser: torch.optim.Optimizer) -> None:
    """The optimiser takes any state that it is given: here it must have the shapes of the parameters."""
    for parameter, state in optimiser.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            require(state[name].shape == parameter.shape, name, f"shape {tuple(parameter.shape)}", tuple(state[name].shape))


def load_run(run: Path | str, device: str = "cpu") -> tuple[Config, RoutedLanguageModel]:
    """The settings and the fitted model of a run folder, in evaluation mode.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    run = Path(run)
    config = load_config(require_file(run, CONFIG))
    path = require_file(run, WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(config, shapes)
            weights = {name: file.get_tensor(name) for name in shapes}
            metadata = file.metadata()
        if metadata is not None:  # other writers of safetensors leave none
            found = metadata.get("sha256")
            require(found == weights_digest(weights), "checksum", "that of the tensors", found)
        model = RoutedLanguageModel.from_config(config)
        model.load_state_dict(weights)
    except (*DAMAGE, SafetensorError) as error:
        raise ValueError(
            f"{path}: expected the weights of the model in {CONFIG}; damaged or another's: {first_line(error)}"
        ) from error
    return config, model.to(device).eval()


def _check_shapes(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare settings with stored shapes before a model of the size that the settings claim is built."""
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
    require(set(wanted) == set(shapes), "names", "those of the model", sorted(set(wanted) ^ set(shapes))[:3])
    for name, tensor in wanted.items():
        require(tuple(tensor.shape) == shapes[name], name, str(tuple(tensor.shape)), shapes[name])
