"""What the launches of a forward and backward pass share.

Tile sizes, the call's facts, scratch, joining kernels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div
from bayes_router.attention.kernels.triton import forward
from bayes_router.attention.kernels.triton.launch import launch
from bayes_router.attention.kernels.triton.plan import Plan, WorkList

BESIDE, BESIDE_TRAINED = 2**17, 2**15
"""Query heads times queries from which full attention and the other experts run on two streams.

One fills what the other leaves of the device; with less work the host pays more than that saves.
With gradients less is enough: the host pays for so many launches that the two are few among them.
"""
Sizes = dict[str, int]
# Gluon is experimental: its calls and `launch`'s descriptors are this version's
_GLUON = triton.__version__.startswith("3.6.")


@dataclass(frozen=True)
class Tiles:
    """Tile sizes, warps and pipeline stages of each kernel.

    `full_dq` shares the work items, hence BM, of `full`.
    """

    full: Sizes
    local: Sizes
    linear: Sizes
    chunk: Sizes
    full_dq: Sizes
    local_dq: Sizes
    linear_dq: Sizes
    dkv: Sizes
    linear_dkv: Sizes
    per_sm: int  # resident programs of the full kernel on a multiprocessor
    per_sm_dq: int
    rounds: int = 8  # work items for each of them, about
    hopper: bool = False  # `full` is that of `hopper.full_kernel`


def _sizes(rows: int, keys: int, warps: int, stages: int, registers: int | None = None) -> Sizes:
    sizes = {"BM": rows, "BN": keys, "num_warps": warps, "num_stages": stages}
    # fewer registers, more resident programs
    return sizes if registers is None else {**sizes, "maxnreg": registers}


def takes_hopper(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `hopper.full_kernel` computes these.

    Halves, heads of 128, where it beats `forward.full_kernel`; strides that TMA knows.
    """
    return (
        _GLUON
        and q.is_cuda
        and q.shape[3] == 128
        and q.dtype != torch.float32
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and all(x.data_ptr() % 16 == 0 and x.numel() > 0 for x in (k, v))
        and all(stride > 0 and stride % 8 == 0 for x in (k, v) for stride in x.stride()[:3])
    )


def tiles(head_dim: int, dtype: torch.dtype, hopper: bool = False) -> Tiles:
    """What measured fastest on an H100.

    float32 takes small tiles, its products are not tensor-core ones.
    """
    if dtype == torch.float32:
        small = _sizes(32, 32, 4, 1)
        return Tiles(small, small, small, small, small, small, small, small, small, 2, 2)
    deep, shallow = _sizes(64, 64, 4, 3), _sizes(64, 64, 4, 2)
    # shared memory ends here: one stage, and a state's rows over twice the threads
    if head_dim > 128:
        tile = _sizes(64, 32, 8, 1)
        low = _sizes(32, 32, 8, 1)
        return Tiles(_sizes(64, 64, 8, 2), tile, tile, tile, tile, tile, tile, low, low, 1, 1)
    if head_dim > 64:
        pair, flat = _sizes(32, 64, 4, 2), _sizes(64, 32, 4, 3)
        return Tiles(
            full={"BM": 128, "BN": 128, "STAGES": 2, "REGISTERS": 240, "num_warps": 4}
            if hopper
            else _sizes(128, 64, 8, 3),
            local=deep,
            linear=flat,
            chunk=shallow,
            full_dq=_sizes(128, 32, 8, 3, 128),
            local_dq=flat,
            linear_dq=deep,
            dkv=pair,
            linear_dkv=pair,
            per_sm=1,
            per_sm_dq=2,
            hopper=hopper,
        )
    return Tiles(
        full=_sizes(64, 64, 4, 3, 168),
        local=deep,
        linear=_sizes(64, 32, 4, 3, 128),
        chunk=_sizes(64, 128, 4, 2, 128),
        full_dq=_sizes(64, 64, 4, 3, 168),
        local_dq=deep,
        linear_dq=_sizes(64, 32, 4, 3, 128),
        dkv=_sizes(32, 128, 4, 2),
        linear_dkv=_sizes(32, 64, 4, 1, 168),
        per_sm=3,
        per_sm_dq=3,
        rounds=6,
    )


class Queries(NamedTuple):
    """The queries that a kernel takes.

    Those of its kind in a plan, or every one (`sorted` False: the tables are not read).
    """

    order: Tensor
    before: Tensor
    sorted: bool = True
    units: int = 1  # rows of the tables to a row of the batch

    @property
    def steps(self) -> int:
        """Entries of `before` up to its last."""
        return self.before.shape[2] - 1


@dataclass(frozen=True)
class Call:
    """What every launch of one pass needs beside the tensors."""

    plan: Plan
    work: WorkList
    native: tuple[int, int, int]
    window: int
    sinks: int
    scale: float  # 1 / sqrt(Dh) of the unpadded head size, times log2(e)
    starts: Tensor | None
    start: int
    covered: bool  # every row is written by one of the kernels
    tiles: Tiles
    programs: int
    units: int  # R

    @property
    def rows(self) -> Queries:
        """The plan as kernels take it."""
        return Queries(self.plan.order, self.plan.before, units=self.units)


def combine(
    call: Call,
    partial: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    block: int,
    add: bool,
) -> None:
    """Join the partial results of split blocks of full attention, or sum them if `add`."""
    (B, H, T, D), (plan, work) = out.shape, (call.plan, call.work)
    if work.slots:
        rows = 32
        launch(
            forward.combine_kernel, (H, min(ceil_div(T, rows), 64), B),
            partial, partial_lse, out, lse, plan.order, plan.before, work.parts, *strides(out), H,
            H // call.units, T,
            plan.before.shape[2] - 1, work.parts.shape[1], S=work.parts.shape[2] - 1, BM=block,
            ROWS=rows, D=D, SUM=add,
        )  # fmt: skip


def partials(call: Call, block: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scratch for the results of split blocks: values and normalisers."""
    slots = max(call.work.slots * (like.shape[1] // call.units), 1)
    values = torch.empty(slots, block, like.shape[3], device=like.device, dtype=like.dtype)
    return values, torch.empty(slots, block, device=like.device, dtype=torch.float32)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 where the interpreter runs on the CPU."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


def fills(q: Tensor) -> bool:
    """Whether queries [B, H, T, D] are work enough for two streams.

    In a CUDA graph, where the host pays nothing, any are.
    """
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    least = BESIDE_TRAINED if q.requires_grad and torch.is_grad_enabled() else BESIDE
    return q.is_cuda and (rows >= least or torch.cuda.is_current_stream_capturing())


def empty(like: Tensor, covered: bool) -> Tensor:
    """Memory for rows that the kernels will all write, or else zeros."""
    return torch.empty_like(like) if covered else torch.zeros_like(like)


def output(q: Tensor, covered: bool) -> Tensor:
    """As `empty`, laid out as [B, T, H, D]: who joins the heads then copies nothing."""
    B, H, T, D = q.shape
    made = torch.empty if covered else torch.zeros
    return made(B, T, H, D, device=q.device, dtype=q.dtype).transpose(1, 2)


def precision(x: Tensor) -> str:
    """The precision of products of float32; halves ignore it."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def strides(*xs: Tensor) -> list[int]:
    """The strides of batch, head and token of each; the last dimension is contiguous."""
    return [stride for x in xs for stride in x.stride()[:3]]


def chunk_size(num_keys: int) -> int:
    """Tokens between two kept states.

    Short enough for the reads, long enough that states take less memory than keys.
    """
    return 64 if num_keys <= 1024 else 128 if num_keys <= 8192 else 256
