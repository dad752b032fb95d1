"""Several processes that train one patched model.

DistributedDataParallel shares the model's own weights; what a patch added lies outside of it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from bayes_router.training.distributed import World, joined


@torch.no_grad()
def share_weights(parameters: Iterable[Tensor]) -> None:
    """Every process gets those of the first."""
    if joined().size > 1:
        for parameter in parameters:
            dist.broadcast(parameter, 0)


@torch.no_grad()
def share_gradients(parameters: Iterable[Tensor]) -> World:
    """Their mean over processes, in one message; a process without a gradient counts as zero."""
    world = joined()
    trained = [p for p in parameters if p.requires_grad]
    if world.size > 1 and trained:
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        mean = world.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(
            gradients, mean.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))
    return world
