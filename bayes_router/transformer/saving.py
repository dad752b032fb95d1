"""The weights of a model on disk, and what is read of them before they are believed.

model.safetensors holds the tensors; in its metadata the settings that they were made with, the
version that wrote them, and a SHA-256 over all three. A flipped bit is found, not used.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_router import __version__
from bayes_router.checks import require
from bayes_router.config import Config, ModelConfig, config_from_toml
from bayes_router.files import CONFIG, WEIGHTS, first_line, write_whole

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


def save_weights(folder: Path, model: nn.Module, settings: str) -> None:
    """Write model.safetensors, with the settings that the model was made with, as TOML."""
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
    write_whole(folder / WEIGHTS, lambda p: save_file(weights, p, metadata))


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


def read_weights(path: Path) -> tuple[dict[str, Tensor], Config | None]:
    """The tensors of a file, and the settings beside them where it has some.

    Raises:
        ValueError: the file is damaged.
    """
    with damage_named(path):
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
        return weights, settings_in(table)


def read_settings_beside(path: Path) -> Config | None:
    """The settings beside the tensors of a file, unread; None where that has none, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return settings_in(_table_of(file.metadata() or {}))
    except (*DAMAGE, SafetensorError):
        return None


def fill(
    build: Callable[[ModelConfig], nn.Module],
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    path: Path,
) -> Any:
    """The model that `build` makes of `config`, with the weights that were read from `path`.

    Raises:
        ValueError: they are another model's, or no numbers; a model of the size that the settings
            claim is built only once they fit.
    """
    with damage_named(path):
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        _check_shapes(build, config, shapes)
        check_finite(weights)
        model = build(config)
        model.load_state_dict(weights)
    return model


@contextmanager
def damage_named(
    path: Path, expected: str = f"the weights of the model in {CONFIG}"
) -> Iterator[None]:
    """Whatever a reader raises inside becomes one ValueError that names the file."""
    try:
        yield
    except (*DAMAGE, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: expected {expected}; damaged or another's: "
            f"{first_line(error)}{other_version(path.parent)}"
        ) from error


def other_version(folder: Path) -> str:
    """By which other version a folder was written, as the end of a message."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            version = str(_table_of(file.metadata() or {}).get("version", __version__))
    except (*DAMAGE, SafetensorError):
        return ""
    return (
        ""
        if version == __version__
        else f"; bayes-router {version} wrote this run, this is {__version__}"
    )


def settings_in(table: Mapping[str, Any]) -> Config | None:
    """The settings that weights were made with; None in files of before, and of other programs."""
    text = table.get("settings")
    require(text is None or isinstance(text, str), "settings", "a text", text)
    return None if text is None else config_from_toml(str(text))


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Weights that are no numbers give text and figures that are none."""
    for name, tensor in weights.items():
        require(
            bool(torch.isfinite(tensor).all()),
            name,
            "numbers",
            "NaN or infinity",
            "take an earlier copy, or fit again",
        )


def _table_of(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What model.safetensors says of its tensors.

    Files of before have the checksum alone, as an entry of its own.
    """
    table = json.loads(metadata["run"]) if "run" in metadata else metadata
    require(isinstance(table, Mapping), "run", "a table", table)
    return dict(table)


def _check_shapes(
    build: Callable[[ModelConfig], nn.Module],
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare settings with stored shapes."""
    layers = {name.split(".")[2] for name in shapes if name.startswith("network.blocks.")}
    require(
        layers == set(map(str, range(len(layers)))) and len(layers) == config.num_layers,
        "layers",
        str(len(layers)),
        config.num_layers,
    )
    with torch.device("meta"):
        wanted = build(config).state_dict()
    require(
        set(wanted) == set(shapes),
        "names",
        "those of the model",
        sorted(set(wanted) ^ set(shapes))[:3],
    )
    for name, tensor in wanted.items():
        require(tuple(tensor.shape) == shapes[name], name, str(tuple(tensor.shape)), shapes[name])
