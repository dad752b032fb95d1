"""Launches of linear attention, plain or gated, over the rows of a plan or over all."""

from typing import Any

import torch
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div, power_of_2
from bayes_router.attention.kernels.triton import linear as kernels
from bayes_router.attention.kernels.triton import linear_backward as backward_kernels
from bayes_router.attention.kernels.triton.call import (
    Queries,
    Tiles,
    chunk_size,
    precision,
    strides,
)
from bayes_router.attention.kernels.triton.launch import launch

PREFIX, FADED = 256, 64  # entries of the states that a program of the prefix takes
CHUNKS = 16  # states that it takes at a time where they fade


def decays(log_gate: Tensor | None) -> Tensor | None:
    """Sums of the log gates [B, H, T] up to each key, float64."""
    if log_gate is None:
        return None
    gates, T = log_gate.detach().contiguous(), log_gate.shape[2]
    found = torch.empty_like(gates, dtype=torch.float64)
    block = min(4096, power_of_2(T))
    launch(
        kernels.decay_kernel, (gates.shape[0] * gates.shape[1],), gates, found, T, BLOCK=block,
        num_warps=8 if block > 1024 else 4,
    )  # fmt: skip
    return found


def empty_states(k: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Memory for S [B, HK, NC, D, D] and z [B, HK, NC, D], one for each chunk of keys."""
    B, H, T, D = k.shape
    count = ceil_div(T, chunk)
    wide = torch.float32 if k.dtype == torch.float32 else torch.bfloat16
    s = torch.empty(B, H, count, D, D, device=k.device, dtype=wide)
    return s, torch.empty(B, H, count, D, device=k.device, dtype=torch.float32)


def linear_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, out: Tensor, lse: Tensor, rows: Queries,
    tiles: Tiles, state: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Writes the rows of out, their denominators to lse, the state before each chunk of keys."""
    linear_states(k, v, decay, tiles, state)
    linear_reads(q, k, v, decay, out, lse, rows, tiles, state)


def linear_states(
    k: Tensor, v: Tensor, decay: Tensor | None, tiles: Tiles, state: tuple[Tensor, ...]
) -> None:
    """Writes the state before each chunk of keys."""
    (B, HK, T, _), chunk, (s, z) = k.shape, chunk_size(k.shape[2]), state
    sizes = {**tiles.chunk, "BN": min(chunk, tiles.chunk["BN"])}
    launch(
        kernels.chunk_kernel, (s.shape[2], HK, B),
        k, v, s, z, z if decay is None else decay, *strides(k, v), HK, HK // v.shape[1], T,
        s.shape[2], CHUNK=chunk, **_fixed(k, decay), **_without(sizes, "BM"),
    )  # fmt: skip
    prefix(s, z, T, chunk, decay)


def linear_reads(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, out: Tensor, lse: Tensor, rows: Queries,
    tiles: Tiles, state: tuple[Tensor, ...], starts: Tensor | None = None, start: int = 0,
) -> None:  # fmt: skip
    """Writes the rows of out and their denominators to lse, of states that stand."""
    (B, H, Tq, _), (_, HK, T, _) = q.shape, k.shape
    vgroup, chunk, fixed = HK // v.shape[1], chunk_size(T), _fixed(q, decay)
    s, z = state
    count, gates = s.shape[2], lse if decay is None else decay
    read = {
        **fixed,
        "SORTED": rows.sorted,
        "STARTS": starts is not None,
        "CHUNK": chunk,
        **tiles.linear,
    }
    if decay is not None:
        read.pop("maxnreg", None)  # the weights of a tile want registers of their own
    launch(
        kernels.linear_kernel, (H, ceil_div(Tq, read["BM"]), B),
        q, k, v, out, lse, s, z, gates, rows.order, rows.before,
        rows.before if starts is None else starts,
        *strides(q, k, v, out), H, H // HK, vgroup, H // rows.units, Tq, rows.steps, T, start,
        count, **read,
    )  # fmt: skip


def linear_backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, out: Tensor, dout: Tensor, lse: Tensor,
    delta: Tensor, state: list[Tensor], dq: Tensor, dk: Tensor, dv: Tensor,
    dlog_gate: Tensor | None, rows: Queries, tiles: Tiles,
) -> None:  # fmt: skip
    """Writes its rows of dq, the gradients of k and v, and those of the log gates if there are any.

    As many q as k. `dlog_gate` is zero where `rows` are sorted: each writes its own.
    """
    (B, H, T, _), HK, count, chunk = q.shape, k.shape[1], state[0].shape[2], chunk_size(k.shape[2])
    group, vgroup, fixed = (
        H // HK,
        HK // v.shape[1],
        {**_fixed(q, decay), "SORTED": rows.sorted, "CHUNK": chunk},
    )
    gates, tables = lse if decay is None else decay, (rows.order, rows.before)
    dgate = lse if dlog_gate is None else dlog_gate
    launch(
        backward_kernels.linear_dq_kernel, (H, ceil_div(T, tiles.linear_dq["BM"]), B),
        q, k, v, out, dout, lse, delta, dq, *state, gates, dgate, *tables,
        *strides(q, k, v, out, dout, dq), H, group, vgroup,
        H // rows.units, T, rows.steps, count, **fixed, **tiles.linear_dq,
    )  # fmt: skip
    r, rz = torch.empty_like(state[0]), torch.empty_like(state[1])
    launch(
        backward_kernels.chunk_reverse_kernel, (count, HK, B),
        q, dout, lse, delta, r, rz, gates, *tables, *strides(q, dout), H, group, H // rows.units,
        T, rows.steps, count, **fixed,
        **_without(tiles.linear_dkv, "BN"),
    )  # fmt: skip
    cross = prefix(r, rz, T, chunk, decay, state)
    own = dv if vgroup == 1 else torch.empty_like(k)  # one a key head, then added up
    launch(
        backward_kernels.linear_dkv_kernel, (HK, ceil_div(T, tiles.linear_dkv["BN"]), B),
        q, k, v, dout, lse, delta, dk, own, r, rz, gates, dgate, *tables,
        *strides(q, k, v, dout, dk, own), H, group, vgroup,
        H // rows.units, T, rows.steps, count, **fixed, **tiles.linear_dkv,
    )  # fmt: skip
    if vgroup > 1:
        dv.copy_(own.unflatten(1, (-1, vgroup)).sum(2))
    if decay is not None:
        parts = cross.shape[1]
        launch(
            backward_kernels.log_gate_kernel, (count, B * H),
            dgate, cross, T, count, parts, CHUNK=chunk, PARTS=power_of_2(parts),
            num_warps=4,
        )  # fmt: skip


def prefix(
    s: Tensor,
    z: Tensor,
    num_keys: int,
    chunk: int,
    decay: Tensor | None = None,
    others: list[Tensor] | None = None,
) -> Tensor:
    """In place: what stands before each chunk or, given the states that do, after it.

    Then their products [B HK, parts, NC].
    """
    B, H, count, D = z.shape
    block = min(PREFIX, D * D) if decay is None else min(FADED, D)
    reverse = others is not None
    parts = D * D // block + ceil_div(D, block)
    cross = (
        torch.empty(B * H, parts, count, device=z.device, dtype=torch.float32)
        if reverse and decay is not None
        else z
    )
    launch(
        kernels.prefix_kernel, (parts, B * H),
        s, z, *(others or (s, z)), z if decay is None else decay, cross, count, num_keys,
        DECAY=decay is not None,
        REVERSE=reverse, CHUNK=chunk, D=D, N=CHUNKS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return cross


def _fixed(q: Tensor, decay: Tensor | None) -> dict[str, Any]:
    return {"D": q.shape[3], "PRECISION": precision(q), "DECAY": decay is not None}


def _without(sizes: dict[str, int], name: str) -> dict[str, int]:
    return {key: value for key, value in sizes.items() if key != name}
