# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Sorting the tokens by route on the GPU, with static shapes and without the host.

The tables that every kernel reads.

For each row of the batch b, each of its R routing units r, as row u = b R + r of the tables (U = B
R of them), and each kind of expert (0 full, 1 linear, 2 local):

    order  int32 [U, 3, T]       its tokens, ascending; only the first `count` entries are written
    before int32 [U, 3, NB + 1]  how many stand before token 64 * j; the last entry is their count

Full attention is further cut into work items, so that a long row of blocks does not hold up the
device: block i of BM sorted queries against keys [s * L, (s + 1) * L). L is chosen on the device
from the work that there is. The list puts items that use all L keys first, then those cut short by
causality, and among these the unsplit blocks (s = 0) last.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bayes_router.attention.kernels.capability import ceil_div, power_of_2
from bayes_router.attention.kernels.triton.launch import follow, launch

KINDS = 3
FULL, LINEAR, LOCAL = 0, 1, 2
STEP = 64  # tokens between two entries of `before`
PLAN_BLOCK = 4096
MIN_KEYS = 1024  # keys in an item, at least, where there is an item for every program
MAX_SEGMENTS = 16  # items that a block is split into, at most


class Plan(NamedTuple):
    """Where the tokens of each kind are. Shapes as in this module's docstring."""

    order: Tensor
    before: Tensor


class WorkList(NamedTuple):
    """The work items of full attention, of one head of a unit; every head of it has the same.

    items: int32 [N, 8]: row of the tables, block, first key, end of its keys, end of those that the
        whole block sees, and the number under which its partial result is kept (-1: the block is
        not split).
    parts: int32 [U, blocks, S + 1]: how many items a block was split into, and their numbers.
    counters: int32 [3]: the number of items times heads of a unit; how many of them were taken in
        the forward pass, and in the backward pass.
    """

    items: Tensor
    parts: Tensor
    counters: Tensor
    slots: int


@triton.jit
def sort_tokens(
    Route, Lengths, Order, Before, T, NB, R, stride_b, stride_t, stride_r, full, linear, local,
    num_experts, part, last_part,
    kind, u, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The entries that BLOCK tokens have in row u of both tables, in one kind."""
    b, r = u // R, u % R
    wanted = tl.where(kind == 0, full, tl.where(kind == 1, linear, local))
    length = T
    if PADDED:
        length = tl.load(Lengths + b).to(tl.int32)
    Route += b * stride_b + r * stride_r
    earlier = tl.zeros([BLOCK], tl.int32)
    for p in range(part):
        t = p * BLOCK + tl.arange(0, BLOCK)
        earlier += (
            tl.load(Route + t.to(tl.int64) * stride_t, mask=t < length, other=-2) == wanted
        ).to(tl.int32)
    count = tl.sum(earlier, 0)

    t = part * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(Route + t.to(tl.int64) * stride_t, mask=t < length, other=-2)
    wrong = (t < length) & ((choice < 0) | (choice >= num_experts))
    tl.device_assert(tl.sum(wrong.to(tl.int32), 0) == 0, "route out of range")
    chosen = (choice == wanted).to(tl.int32)
    upto = count + tl.cumsum(chosen, 0)
    row = u * 3 + kind
    tl.store(Order + row * T + upto - 1, t, mask=chosen > 0)
    tl.store(Before + row * (NB + 1) + t // 64, upto - chosen, mask=(t % 64 == 0) & (t < T))
    if part == last_part:
        tl.store(Before + row * (NB + 1) + NB, count + tl.sum(chosen, 0))


@triton.jit(debug=True)  # keeps the assertion: a route out of range must not pass silently
def _plan_kernel(
    Route, Lengths, Order, Before, T, NB, R, stride_b, stride_t, stride_r, full, linear, local,
    num_experts,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, kind, row of the tables)."""
    follow()
    sort_tokens(
        Route, Lengths, Order, Before, T, NB, R, stride_b, stride_t, stride_r, full, linear, local,
        num_experts,
        tl.program_id(0), tl.num_programs(0) - 1, tl.program_id(1), tl.program_id(2).to(tl.int64),
        PADDED, BLOCK,
    )  # fmt: skip


@triton.jit
def _blocks_before(Row, key, begin, NB, BM: tl.constexpr):
    """Blocks of sorted full queries that stand before `key`.

    It may tell fewer, as `before` knows every 64th token.
    """
    return tl.load(Row + tl.minimum(tl.maximum(key - begin, 0) // 64, NB)) // BM


@triton.jit
def _work(
    Before, Starts, U, R, NB, start, STARTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr
):
    """Blocks of full queries times the keys that they see, of one head of each unit."""
    work = 0.0
    for first in range(0, U * NB, BLOCK):
        x = first + tl.arange(0, BLOCK)
        u, j = x // NB, x % NB
        inside = u < U
        begin = start
        if STARTS:
            begin = tl.load(Starts + u // R, mask=inside, other=0).to(tl.int32)
        row = Before + u * 3 * (NB + 1)
        left = tl.load(row + NB, mask=inside, other=0) - tl.load(row + j, mask=inside, other=0)
        seen = tl.where(inside, tl.where(j == 0, begin + 64, 64), 0)
        work += tl.sum(((left + BM - 1) // BM).to(tl.float32) * seen.to(tl.float32), 0)
    return work


@triton.jit
def _schedule_kernel(
    Order, Before, Starts, Items, Parts, Counters, U, R, UNIT, T, NB, num_keys, start, programs,
    max_blocks,
    STARTS: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROUNDS: tl.constexpr, MIN_KEYS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program writes the items of one group (u, s); all agree on the groups' sizes."""
    follow()
    work = _work(Before, Starts, U, R, NB, start, STARTS, BM, BLOCK)
    keys = tl.maximum(work * UNIT / (programs * ROUNDS), (num_keys + S - 1) // S)
    # with little work shorter items, for otherwise most programs would have none
    least = tl.minimum(tl.maximum(work * UNIT / programs, 256), MIN_KEYS)
    L = (tl.maximum(keys, least).to(tl.int32) + 127) // 128 * 128

    # first the groups with all L keys, u outer; then those cut short, s descending, u inner
    g = tl.arange(0, GROUPS)
    short = g >= U * S
    x = tl.where(short, g - U * S, g)
    inside = g < 2 * U * S
    u = tl.where(inside, tl.where(short, x % U, x // S), 0)
    s = tl.where(short, S - 1 - x // U, x % S)
    begin = tl.zeros([GROUPS], tl.int32) + start
    if STARTS:
        begin = tl.load(Starts + u // R).to(tl.int32)
    row = Before + u * 3 * (NB + 1)
    blocks = (tl.load(row + NB) + BM - 1) // BM
    hi = tl.where(
        s == S - 1, blocks, tl.minimum(_blocks_before(row, (s + 1) * L, begin, NB, BM), blocks)
    )
    lo = tl.minimum(_blocks_before(row, s * L, begin, NB, BM), hi)
    size = tl.where(inside, tl.where(short, hi - lo, blocks - hi), 0)
    ends = tl.cumsum(size, 0)

    mine = g == tl.program_id(0)  # now the one group of this program
    mu, ms = tl.sum(tl.where(mine, u, 0), 0), tl.sum(tl.where(mine, s, 0), 0)
    msize = tl.sum(tl.where(mine, size, 0), 0)
    moffset = tl.sum(tl.where(mine, ends - size, 0), 0)
    mfirst = tl.sum(tl.where(mine, tl.where(short, lo, hi), 0), 0)
    mbegin = tl.sum(tl.where(mine, begin, 0), 0)
    last_part = tl.program_id(0) >= U * S
    mrow = Before + mu * 3 * (NB + 1)
    count = tl.load(mrow + NB)
    # earlier blocks are not split
    one = tl.where(S == 1, max_blocks, _blocks_before(mrow, L, mbegin, NB, BM))
    for first in range(0, msize, WIDTH):
        n = first + tl.arange(0, WIDTH)
        real = n < msize
        i, number = mfirst + n, moffset + n
        line = Order + mu * 3 * T
        begins = tl.load(line + i * BM, mask=real, other=0) + mbegin
        ends_at = tl.load(line + tl.minimum((i + 1) * BM, count) - 1, mask=real, other=0) + mbegin
        first_key = ms * L
        end = tl.maximum(tl.minimum((ms + 1) * L, ends_at + 1), first_key)
        seen = tl.maximum(tl.minimum((begins + 1) // BN * BN, end // BN * BN), first_key)
        split = i >= one
        item = Items + number * 8
        tl.store(item, mu + tl.zeros([WIDTH], tl.int32), mask=real)
        tl.store(item + 1, i, mask=real)
        tl.store(item + 2, first_key + tl.zeros([WIDTH], tl.int32), mask=real)
        tl.store(item + 3, end, mask=real)
        tl.store(item + 4, seen, mask=real)
        tl.store(item + 5, tl.where(split, number, -1), mask=real)
        part = Parts + (mu * max_blocks + i) * (S + 1)
        tl.store(part + 1 + ms, number, mask=real)
        tl.store(part, tl.where(split, ms + 1, 1), mask=real & last_part)
    if tl.program_id(0) == 0:
        tl.store(Counters, tl.sum(size, 0) * UNIT)
        tl.store(Counters + 1, 0)
        tl.store(Counters + 2, 0)


def empty_plan(route: Tensor) -> Plan:
    """Memory for the tables of route [B, T, R]."""
    B, T, R = route.shape
    order = torch.empty(B * R, KINDS, T, dtype=torch.int32, device=route.device)
    return Plan(
        order,
        torch.empty(B * R, KINDS, ceil_div(T, STEP) + 1, dtype=torch.int32, device=route.device),
    )


def make_plan(
    route: Tensor, indices: tuple[int, int, int], num_experts: int, lengths: Tensor | None
) -> Plan:
    """Sort the tokens by route [B, T, R].

    `indices` are those of full, linear and local among the experts, -1 where absent.
    """
    (B, T, R), (order, before) = route.shape, empty_plan(route)
    blocks = before.shape[2] - 1
    block = min(PLAN_BLOCK, power_of_2(T))
    if R > 1 and 2 * block < T:  # every block reads all before it: choices of a unit side by side
        route = route.transpose(1, 2).contiguous().transpose(1, 2)
    launch(
        _plan_kernel, (ceil_div(T, block), KINDS, B * R),
        route, route if lengths is None else lengths, order, before, T, blocks, R, *route.stride(),
        *indices, num_experts, PADDED=lengths is not None, BLOCK=block,
        num_warps=8 if block > 1024 else 4, sanitize_overflow=False,
    )  # fmt: skip
    return Plan(order, before)


def make_work(
    plan: Plan,
    units: int,
    unit_heads: int,
    num_keys: int,
    starts: Tensor | None,
    tile: tuple[int, int],
    programs: int,
    rounds: int,
) -> WorkList:
    """Cut full attention into items for `programs` resident programs, about `rounds` for each.

    `tile` is (queries, keys) of their tiles.

    A row of the batch has `units` rows in the tables, each for `unit_heads` query heads.
    """
    U, _, T = plan.order.shape
    segments = max(1, min(MAX_SEGMENTS, 128 // power_of_2(U)))
    blocks, max_blocks = plan.before.shape[2] - 1, ceil_div(T, tile[0])
    # at most, of one head of each unit: items with all their keys
    split = programs * rounds // unit_heads + U * segments
    items = torch.empty(split + U * max_blocks, 8, dtype=torch.int32, device=plan.order.device)
    parts = torch.empty(U, max_blocks, segments + 1, dtype=torch.int32, device=plan.order.device)
    counters = torch.empty(3, dtype=torch.int32, device=plan.order.device)
    launch(
        _schedule_kernel, (2 * U * segments,),
        plan.order, plan.before, plan.before if starts is None else starts, items, parts, counters,
        U, units, unit_heads, T, blocks, num_keys, num_keys - T, programs, max_blocks,
        STARTS=starts is not None, S=segments, BM=tile[0], BN=tile[1], ROUNDS=rounds,
        MIN_KEYS=MIN_KEYS,
        GROUPS=power_of_2(2 * U * segments),
        BLOCK=min(2048, power_of_2(U * blocks)), WIDTH=64,
        num_warps=4,
    )  # fmt: skip
    return WorkList(items, parts, counters, 2 * split if segments > 1 else 0)
