"""Sorting the tokens by route on the GPU, with static shapes and without the host: the tables that every kernel reads.

For each row of the batch and each kind of expert (0 full, 1 linear, 2 local):

    order  int32 [B, 3, T]       its tokens, ascending; only the first `count` entries are written
    before int32 [B, 3, NB + 1]  how many of them stand before token 64 * j; the last entry is their count

Full attention is further cut into work items, so that a long row of blocks does not hold up the device: block i of BM sorted
queries against keys [s * L, (s + 1) * L). L is chosen on the device from the work that there is. Items are grouped by (b, s):
first those that use all L keys, then those cut short by causality, the unsplit blocks (s = 0) last.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = 3
FULL, LINEAR, LOCAL = 0, 1, 2
STEP = 64  # tokens between two entries of `before`
PLAN_BLOCK = 4096
ROUNDS = 6  # work items for each resident program, about
MIN_KEYS = 1024  # keys in an item, at least


class Plan(NamedTuple):
    """Where the tokens of each kind are. Shapes as in this module's docstring."""

    order: Tensor
    before: Tensor


class Schedule(NamedTuple):
    """The work items of full attention.

    table: int32 [2 G + 3]: where each group ends, its first block, then L, the number of items, and the next one to take.
    segments: S, segments of L keys in a row at most; G = 2 B S.
    slots: partial results that splitting can need.
    """

    table: Tensor
    segments: int
    slots: int


@triton.jit(debug=True)  # keeps the assertion: a route out of range must not pass silently
def _plan_kernel(
    Route, Lengths, Order, Before, T, NB, stride_b, stride_t, full, linear, local, num_experts,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, kind, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    wanted = tl.where(kind == 0, full, tl.where(kind == 1, linear, local))
    length = T
    if PADDED:
        length = tl.load(Lengths + b).to(tl.int32)
    Route += b * stride_b
    earlier = tl.zeros([BLOCK], tl.int32)
    for p in range(part):
        t = p * BLOCK + tl.arange(0, BLOCK)
        earlier += (tl.load(Route + t.to(tl.int64) * stride_t, mask=t < length, other=-2) == wanted).to(tl.int32)
    count = tl.sum(earlier, 0)

    t = part * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(Route + t.to(tl.int64) * stride_t, mask=t < length, other=-2)
    tl.device_assert((t >= length) | ((choice >= 0) & (choice < num_experts)), "route out of range")
    chosen = (choice == wanted).to(tl.int32)
    upto = count + tl.cumsum(chosen, 0)
    row = b * 3 + kind
    tl.store(Order + row * T + upto - 1, t, mask=chosen > 0)
    tl.store(Before + row * (NB + 1) + t // 64, upto - chosen, mask=(t % 64 == 0) & (t < T))
    if part == tl.num_programs(0) - 1:
        tl.store(Before + row * (NB + 1) + NB, count + tl.sum(chosen, 0))


@triton.jit
def _first_block(Before, b, start, key, NB, BM: tl.constexpr):
    """Blocks of sorted full queries before this one stand (almost all: tables know every 64th token) before `key`."""
    j = tl.minimum(tl.maximum(key - start, 0) // 64, NB)
    return tl.load(Before + b * 3 * (NB + 1) + j) // BM


@triton.jit
def _schedule_kernel(
    Before, Starts, Table, B, H, NB, num_keys, start, programs,
    STARTS: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, ROUNDS: tl.constexpr, MIN_KEYS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    work = 0.0  # blocks times keys that they see, of one head
    for first in range(0, B * NB, BLOCK):
        x = first + tl.arange(0, BLOCK)
        b, j = x // NB, x % NB
        inside = b < B
        begin = start
        if STARTS:
            begin = tl.load(Starts + b, mask=inside, other=0).to(tl.int32)
        row = Before + b * 3 * (NB + 1)
        left = tl.load(row + NB, mask=inside, other=0) - tl.load(row + j, mask=inside, other=0)
        seen = tl.where(j == 0, begin + 64, 64)
        work += tl.sum(((left + BM - 1) // BM).to(tl.float32) * tl.where(inside, seen, 0).to(tl.float32), 0)
    keys = tl.maximum(work * H / (programs * ROUNDS), (num_keys + S - 1) // S)
    L = (tl.maximum(keys, MIN_KEYS).to(tl.int32) + 127) // 128 * 128

    g = tl.arange(0, GROUPS)  # the groups with all L keys, b outer; then those cut short, s descending, b inner
    short = g >= B * S
    x = tl.where(short, g - B * S, g)
    inside = g < 2 * B * S
    b = tl.where(inside, tl.where(short, x % B, x // S), 0)
    s = tl.where(short, S - 1 - x // B, x % S)
    begin = start
    if STARTS:
        begin = tl.load(Starts + b).to(tl.int32)
    row = Before + b * 3 * (NB + 1)
    count = tl.load(row + NB)
    blocks = (count + BM - 1) // BM
    lo = tl.load(row + tl.minimum(tl.maximum(s * L - begin, 0) // 64, NB)) // BM
    hi = tl.load(row + tl.minimum(tl.maximum((s + 1) * L - begin, 0) // 64, NB)) // BM
    hi = tl.where(s == S - 1, blocks, tl.minimum(hi, blocks))
    lo = tl.minimum(lo, hi)
    size = tl.where(short, hi - lo, blocks - hi)
    size = tl.where(inside, size, 0)
    ends = tl.cumsum(size, 0)
    tl.store(Table + g, ends, mask=inside)
    tl.store(Table + 2 * B * S + g, tl.where(short, lo, hi), mask=inside)
    meta = Table + 4 * B * S
    tl.store(meta, L)
    tl.store(meta + 1, tl.sum(size, 0) * H)
    tl.store(meta + 2, 0)


def make_plan(route: Tensor, indices: tuple[int, int, int], num_experts: int, lengths: Tensor | None) -> Plan:
    """Sort the tokens; `indices` are those of full, linear and local among the experts, -1 where absent."""
    B, T = route.shape
    blocks = triton.cdiv(T, STEP)
    order = torch.empty(B, KINDS, T, dtype=torch.int32, device=route.device)
    before = torch.empty(B, KINDS, blocks + 1, dtype=torch.int32, device=route.device)
    block = min(PLAN_BLOCK, triton.next_power_of_2(T))
    _plan_kernel[(triton.cdiv(T, block), KINDS, B)](
        route, route if lengths is None else lengths, order, before, T, blocks, route.stride(0), route.stride(1),
        *indices, num_experts, PADDED=lengths is not None, BLOCK=block, num_warps=8 if block > 1024 else 4,
    )  # fmt: skip
    return Plan(order, before)


def make_schedule(
    plan: Plan, num_heads: int, num_keys: int, starts: Tensor | None, block: int, programs: int
) -> Schedule:
    """Cut full attention into items for `programs` resident programs; `block` queries each."""
    B, _, T = plan.order.shape
    segments = max(1, min(16, 128 // triton.next_power_of_2(B)))
    groups = 2 * B * segments
    table = torch.empty(2 * groups + 3, dtype=torch.int32, device=plan.order.device)
    blocks = plan.before.shape[2] - 1
    _schedule_kernel[(1,)](
        plan.before, plan.before if starts is None else starts, table, B, num_heads, blocks, num_keys, num_keys - T, programs,
        STARTS=starts is not None, S=segments, BM=block, ROUNDS=ROUNDS, MIN_KEYS=MIN_KEYS,
        GROUPS=triton.next_power_of_2(groups), BLOCK=min(4096, triton.next_power_of_2(B * blocks)), num_warps=8,
    )  # fmt: skip
    return Schedule(table, segments, 2 * (programs * ROUNDS + B * segments * num_heads) + num_heads)
