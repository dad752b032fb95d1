"""Models whose weights accelerate keeps elsewhere between calls.

Reading a weight, and the device that they run on.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def hooks(module: nn.Module) -> Iterator[Any]:
    """What accelerate hung on a module."""
    hook = getattr(module, "_hf_hook", None)
    yield from () if hook is None else getattr(hook, "hooks", (hook,))


def kept(model: nn.Module, name: str) -> Tensor | None:
    """The parameter called `name` where accelerate keeps it; None: nowhere."""
    parts = name.split(".")
    # its own module's hook, or one that places all below it
    for depth in range(len(parts) - 1, -1, -1):
        for hook in hooks(model.get_submodule(".".join(parts[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                found: Tensor = weights[".".join(parts[depth:])]
                return found
    return None


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, by the name that it has first.

    What is offloaded is read where it is kept.

    Offloading takes tied parameters apart, so that one that is tied to an earlier one is left out
    by its name.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    seen: set[str] = set()
    for name, parameter in model.named_parameters():
        if tied.get(name) in seen or any(
            source == name and target in seen for target, source in tied.items()
        ):
            continue
        seen.add(name)
        here = kept(model, name) if parameter.is_meta else parameter
        yield name, parameter if here is None else here.detach()


def in_memory(model: nn.Module) -> bool:
    """Whether every weight is in memory, or where accelerate fetches it from."""
    return not any(p.is_meta and kept(model, name) is None for name, p in model.named_parameters())


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: its first parameter's device, or where that is run."""
    name, first = next(model.named_parameters())
    if first.is_meta:
        owner = model.get_submodule(name.rpartition(".")[0])
        for hook in [*hooks(owner), *hooks(model)]:
            if getattr(hook, "execution_device", None) is not None:
                place: Any = hook.execution_device
                return torch.device(
                    place if isinstance(place, str | torch.device) else f"cuda:{place}"
                )
        return torch.device("cpu")
    return first.device
