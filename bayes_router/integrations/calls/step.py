"""One new token for each row of a batch behind a KV cache.

Only what the rows' own experts read is read.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from bayes_router.attention.kernels.capability import HAS_TRITON
from bayes_router.attention.shapes import by_head, unit_heads
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.linear import LinearExpert
from bayes_router.integrations.calls.masks import OfLast
from bayes_router.integrations.calls.masks import seen as seen_keys
from bayes_router.integrations.calls.softmax import FullExpert, LocalExpert, PatchedExpert


def attend_one(experts: nn.ModuleList, call: AttentionCall, route: Tensor) -> Tensor:
    """[B, H, 1, Dv]: the heads of unit r of row b by experts[route[b, 0, r]].

    The choices are read on the host (on CUDA one small transfer), so that what is not on `full`
    does not read what `full` reads. On CUDA, where a kernel can look at the choices itself, nothing
    waits.
    """
    if call.held is not None or _fused(experts, call):
        return _one_fused(experts, call, route)
    taken: list[list[int]] = route[:, 0].tolist()  # [B][R]
    each = sorted({index for row in taken for index in row})
    if len(each) == 1:
        out: Tensor = experts[each[0]](call)
        return out
    out = call.v.new_zeros(*call.q.shape[:3], call.v.shape[3])
    for index in each:
        expert = _expert(experts, index)
        rows = [b for b, row in enumerate(taken) if index in row]
        split = [b for b in rows if len(set(taken[b])) > 1]
        whole = [b for b in rows if b not in split]
        if whole:
            out[whole] = some(expert, call, whole)
        for b in split:
            _some_heads(expert, call, b, [choice == index for choice in taken[b]], out)
    return out


def _some_heads(
    expert: PatchedExpert, call: AttentionCall, row: int, mine: list[bool], out: Tensor
) -> None:
    """Write the heads of the units of one row that are `mine` [R].

    Keys of a key head are read where one of its units asks.
    """
    H, Hkv, R = call.q.shape[1], call.k.shape[1], len(mine)
    if not expert.splits(call):
        found = some(expert, call, [row])[0]
        for unit, (queries, _) in enumerate(unit_heads(R, H, Hkv)):
            if mine[unit]:
                out[row, queries] = found[queries]
        return
    per_head = [mine[h * R // H] for h in range(H)]
    group = H // Hkv
    asked = [any(per_head[j * group : (j + 1) * group]) for j in range(Hkv)]
    for wanted, run in groupby(range(Hkv), key=asked.__getitem__):
        if wanted:
            neighbours = list(run)
            keys = slice(neighbours[0], neighbours[-1] + 1)
            queries = slice(keys.start * group, keys.stop * group)
            found = some(expert, call.heads(queries, keys), [row])[0]
            of_mine = torch.tensor(per_head[queries], device=found.device)[:, None, None]
            out[row, queries] = torch.where(of_mine, found, out[row, queries])


def some(expert: PatchedExpert, call: AttentionCall, rows: Sequence[int]) -> Tensor:
    """The rows of the batch [n], ascending, of one new token each: [n, H, 1, Dv]."""
    if isinstance(expert, LinearExpert) and call.memory is not None:  # a state is of all rows
        whole: Tensor = expert(call)
        return whole[list(rows)]
    if not expert.in_place(call):
        return expert.read(expert.narrowed(call).batch(torch.tensor(rows, device=call.q.device)))
    neighbours = [
        [b for _, b in group]
        for _, group in groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0])
    ]
    # no keys are copied
    return torch.cat([expert(call.part(slice(part[0], part[-1] + 1))) for part in neighbours])


def remember(experts: nn.ModuleList, call: AttentionCall, route: Tensor | int) -> None:
    """Bring the linear states up to this call.

    Behind a prompt, and before they lag by more than a window.
    """
    memory = call.memory
    if memory is None or not memory.known:
        return
    for index, expert in enumerate(experts):
        if not isinstance(expert, LinearExpert) or (isinstance(route, int) and route != index):
            continue
        running = memory.running.get(type(expert))
        lag = call.k.shape[2] - (0 if running is None else running.length)
        wanted = call.q.shape[2] > 1 if running is None else lag >= expert.shape.window
        if wanted and not expert.needs_grad(call):
            expert.running(call)


def _expert(experts: nn.ModuleList, index: int) -> PatchedExpert:
    expert = experts[index]
    assert isinstance(expert, PatchedExpert)
    return expert


def _fused(experts: nn.ModuleList, call: AttentionCall) -> bool:
    """Whether the decoding kernel of `attention` computes the rows on `full`.

    Plain attention of all keys, on CUDA.
    """
    dim = call.q.shape[3]
    return (
        call.q.device.type == "cuda"
        and call.plain
        and call.causal
        and call.mask is None
        and dim == call.v.shape[3]
        and dim in (16, 32, 64, 128, 256)
        and call.q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and call.k.stride(3) == call.v.stride(3) == 1
        and call.k.stride() == call.v.stride()
        and any(isinstance(expert, FullExpert) for expert in experts)
        and HAS_TRITON
    )


def _one_fused(experts: nn.ModuleList, call: AttentionCall, route: Tensor) -> Tensor:
    """Rows on `full` and `local` by the kernel, which lets the others read nothing.

    Other experts do all rows.
    """
    # only where it can be imported
    from bayes_router.attention.kernels.triton.launch_decode import decode_step

    full, local = (
        next((index for index, expert in enumerate(experts) if isinstance(expert, kind)), -1)
        for kind in (FullExpert, LocalExpert)
    )
    narrow = experts[local] if local >= 0 else None
    window, sinks = (
        (narrow.shape.window, narrow.sinks) if isinstance(narrow, LocalExpert) else (1, 0)
    )
    q, k, v = call.rescaled(), call.k[:, :, -1:], call.v[:, :, -1:]
    rows, held = len(q), call.held
    seen: Tensor | None = None
    sink_end: Tensor | int = sinks
    if held is None:
        held = torch.full((), call.k.shape[2], dtype=torch.int64, device=q.device)
    if call.mask is not None:
        seen, sink_end = seen_and_sinks(call.mask, rows, sinks)
    # the host knows the room, and one number compiles once
    slots = call.k.shape[2] if call.held is not None else 2**31 - 1
    out = decode_step(
        q, k, v, q, k, call.k, call.v, None, route, held.expand(rows), (full, -1, local), window,
        num_experts=len(experts), slots=slots,
        held=True, seen=seen, sink_end=sink_end,
    )  # fmt: skip
    for index, expert in enumerate(experts):
        if index not in (full, local):
            out = torch.where(by_head(route == index, out.shape[1]), expert(call), out)
    return out


@OfLast
def seen_and_sinks(mask: Tensor, rows: int, sinks: int) -> tuple[Tensor, Tensor | int]:
    """Of a mask [B or 1, 1, 1, S]: the keys seen, bool [rows, S], and where the first `sinks` of
    them end, [rows]; 0 without sinks.
    """
    visible = seen_keys(mask)[:, 0, 0]
    end = (visible.cumsum(-1) <= sinks).sum(-1).expand(rows).contiguous() if sinks else 0
    return visible.contiguous().expand(rows, -1), end
