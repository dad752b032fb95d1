"""Where a process computes, and its place among others.

Devices, ranks and what ranks tell each other.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one rank, and every method here
is free of cost.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bayes_router.checks import require

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: they wait while rank 0 prepares a corpus, evaluates and
writes."""

_GROUPS: list[Any] = []
"""Groups that were joined, held until the process ends: were a replica the last to hold one, it
would destroy it under Python's lock, for which a thread of gloo may wait."""


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one; under torchrun, each process of a host takes its own.

    Raises:
        ValueError: torch knows no such device, or has none here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(
            f"train.device: expected auto, cpu or a device that torch has here; got {name!r}: "
            f"{message}"
        ) from error
    return device


@dataclass(frozen=True)
class World:
    """The ranks of a run. Every rank calls the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def replicate(self, objective: nn.Module, device: torch.device) -> nn.Module:
        """`objective`, whose backward pass also averages gradients over ranks.

        Weights start as those of rank 0.
        """
        if self.size == 1:
            return objective
        devices = [device.index] if device.type == "cuda" else None
        # buffers hold the prior, which every rank computes from the schedule
        return DistributedDataParallel(
            objective, devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    @staticmethod
    def averaging(replica: Callable[..., Any], now: bool) -> AbstractContextManager[None]:
        """Keep gradients to this rank unless `now`.

        Of accumulated parts the last alone needs the others.
        """
        return (
            nullcontext()
            if now or not isinstance(replica, DistributedDataParallel)
            else replica.no_sync()
        )

    def each(self, value: float, device: torch.device) -> list[float]:
        """The value of every rank."""
        mine = torch.zeros(self.size, dtype=torch.float64, device=device)
        mine[self.rank] = value
        return (self.mean(mine) * self.size).tolist()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def all(self, value: Tensor) -> Tensor:
        """Whether a bool [] holds on every rank."""
        return value if self.size == 1 else self.mean(value.float()) == 1

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether a bool holds on some rank."""
        return (
            value
            if self.size == 1
            else bool(self.mean(torch.tensor(float(value), device=device)) > 0)
        )

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do."""
        if not self.main:
            dist.barrier()
        yield
        if self.main and self.size > 1:
            dist.barrier()


def joined() -> World:
    """The world of the process group that this process has joined; without one it is alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def connected(device: torch.device) -> Iterator[World]:
    """The world that torchrun describes: NCCL between GPUs, gloo between CPUs.

    The group is taken down at the end; one that the caller has made is used, and stays.

    Raises:
        ValueError: WORLD_SIZE without the other variables that torchrun sets.
    """
    if dist.is_available() and dist.is_initialized():
        yield joined()
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    missing = [
        name
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    require(
        not missing,
        "WORLD_SIZE",
        "with it all that torchrun sets",
        f"no {', '.join(missing)}",
        "launch with torchrun",
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    _GROUPS.append(dist.group.WORLD)
    try:
        yield joined()
    finally:
        dist.destroy_process_group()
