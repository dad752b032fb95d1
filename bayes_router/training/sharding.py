"""Parameters, gradients and moments cut over the ranks (FSDP2).

A checkpoint holds them whole, so that any number of processes reads it. Every function here that
makes something whole is called by all ranks together.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bayes_router.checks import require
from bayes_router.transformer.model import RoutedLanguageModel


def shard(
    objective: nn.Module, blocks: Iterable[nn.Module], device: torch.device, size: int
) -> None:
    """Cut the parameters of `objective`, in place: each block by itself, the rest together.

    A block is whole while its forward or backward pass runs, and no longer.

    Raises:
        ValueError: there is one process.
    """
    fix = "launch with torchrun, or give --train.shard false"
    require(size > 1, "train.shard", "several processes", size, fix)
    mesh = init_device_mesh(device.type, (size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are cut over ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather_gradients(objective: object, now: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, where parameters are cut."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(now)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_model(model: RoutedLanguageModel) -> RoutedLanguageModel:
    """`model` itself, or a copy of it that is not cut."""
    if not is_sharded(model):
        return model
    weights = {name: whole_tensor(tensor) for name, tensor in model.state_dict().items()}
    # on no device at first: nothing is drawn, and nothing is allocated twice
    with torch.device("meta"):
        copy = RoutedLanguageModel(model.config, model.policy)
    copy.load_state_dict(weights, assign=True)
    return copy.train(model.training)


def whole_state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser with whole moments, as one process would save it."""
    state = optimiser.state_dict()
    moments = {
        index: {name: whole_tensor(v) if isinstance(v, Tensor) else v for name, v in of.items()}
        for index, of in state["state"].items()
    }
    return {**state, "state": moments}


def load_whole(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    moments: dict[str, Any],
) -> None:
    """Take what `whole_model` and `whole_state` made, each rank its own part."""
    parameters = dict(model.named_parameters())
    model.load_state_dict(
        {name: _like(parameters.get(name), tensor) for name, tensor in weights.items()}
    )
    optimiser.load_state_dict(moments)
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = _like(parameter, value)


def _like(parameter: Tensor | None, value: Tensor) -> Tensor:
    """`value` cut as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return value
    here = value.to(parameter.device)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements)


def held_bytes(model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and moments that this rank keeps between two steps."""
    tensors: list[Tensor] = list(model.parameters())
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [v for s in optimiser.state.values() for v in s.values() if isinstance(v, Tensor)]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)
