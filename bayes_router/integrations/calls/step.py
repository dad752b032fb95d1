"""One new token for each row of a batch behind a KV cache: only what the rows' own experts read is read."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from bayes_router.attention.kernels.capability import HAS_TRITON
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.linear import LinearExpert
from bayes_router.integrations.calls.softmax import FullExpert, PatchedExpert


def attend_one(experts: nn.ModuleList, call: AttentionCall, route: Tensor) -> Tensor:
    """[B, H, 1, Dv]: row b by experts[route[b, 0]].

    The choices are read on the host (on CUDA one small transfer), so that a row that is not on `full` does not read what
    `full` reads. Several rows on CUDA, where a kernel can look at the choices itself, wait for nothing.
    """
    if len(call.q) > 1 and _fused(experts, call):
        return _one_fused(experts, call, route)
    taken: list[int] = route[:, 0].tolist()
    if len(set(taken)) == 1:
        out: Tensor = experts[taken[0]](call)
        return out
    out = call.v.new_zeros(*call.q.shape[:3], call.v.shape[3])
    for index in sorted(set(taken)):
        rows = [b for b, choice in enumerate(taken) if choice == index]
        out[rows] = some(_expert(experts, index), call, rows)
    return out


def some(expert: PatchedExpert, call: AttentionCall, rows: Sequence[int]) -> Tensor:
    """The rows of the batch [n], ascending, of one new token each: [n, H, 1, Dv]."""
    if isinstance(expert, LinearExpert) and call.memory is not None:  # a state is of all rows
        whole: Tensor = expert(call)
        return whole[list(rows)]
    if not expert.in_place(call):
        return expert.read(expert.narrowed(call).batch(torch.tensor(rows, device=call.q.device)))
    neighbours = [[b for _, b in group] for _, group in groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0])]
    return torch.cat([expert(call.part(slice(part[0], part[-1] + 1))) for part in neighbours])  # no keys are copied


def remember(experts: nn.ModuleList, call: AttentionCall, route: Tensor | int) -> None:
    """Bring the linear states up to this call: behind a prompt, and before they lag by more than a window."""
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
    """Whether the decoding kernel of `attention` computes the rows on `full`: plain attention of all keys, on CUDA."""
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
    """Rows on `full` by the kernel, which lets the others read nothing; the other experts read little and do all rows."""
    from bayes_router.attention.kernels.triton.decode import decode_step  # only where it can be imported

    full = next(index for index, expert in enumerate(experts) if isinstance(expert, FullExpert))
    q = call.rescaled()
    k, v = call.k[:, :, -1:], call.v[:, :, -1:]
    before = torch.full((len(q),), call.k.shape[2] - 1, dtype=torch.int64, device=q.device)
    # the new key and value are in the cache already; the kernel writes them there once more
    out = decode_step(q, k, v, q, k, call.k, call.v, None, route, before, (full, -1, -1), 1, num_experts=len(experts))
    for index, expert in enumerate(experts):
        if index != full:
            out = torch.where((route == index)[:, None, :, None], expert(call), out)
    return out
