# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Launches the kernels of a decoding step."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.attention.kernels.capability import LOG2_E, head_size, power_of_2
from bayes_router.attention.kernels.triton.call import precision
from bayes_router.attention.kernels.triton.decode import decode_kernel, join_kernel
from bayes_router.attention.kernels.triton.launch import launch

MIN_KEYS = 512  # in a stretch, at least
PROGRAMS = 16384  # about as many as are launched
# of a state that a program holds at a time: more would cost the other programs their registers
STATE_ENTRIES = 4096


class GatedStep(NamedTuple):
    """The gated expert of a decoding step.

    Attributes:
        number: its own among the experts.
        state: [B, H, Dh, Dh + 1] float32, advanced in place.
        gate: [H, Dh] and bias, log_scale [H]: the parameters of `GatedLinearAttention`.
        bias: see gate.
        log_scale: see gate.
    """

    number: int
    state: Tensor
    gate: Tensor
    bias: Tensor
    log_scale: Tensor


def _stretches(keys: int, rows: int) -> int:
    """Into how many stretches the keys of a row and key head are cut: a power of 2, at most 64."""
    most, splits = min(64, keys // MIN_KEYS, max(PROGRAMS // max(rows, 1), 1)), 1
    while splits * 2 <= most:
        splits *= 2
    return splits


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plain_q: Tensor,
    plain_k: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    state: Tensor | None,
    route: Tensor,
    lengths: Tensor,
    native: tuple[int, int, int],
    window: int,
    *,
    gated: GatedStep | None = None,
    num_experts: int = 2**31 - 1,
    slots: int | None = None,
    ring: bool = False,
    held: bool = False,
    seen: Tensor | None = None,
    sink_end: Tensor | int = 0,
) -> Tensor:
    """Append one token to each row and attend: [B, H, 1, Dh].

    Rows of experts that are not named here are not written.

    Args:
        q: [B, H, 1, Dh] of the new token, with its positions; the last dimension contiguous.
        k: [B, Hkv, 1, Dh], likewise.
        v: as k.
        plain_q: as q, without positions.
        plain_k: as k, without positions.
        keys: the store [B, Hkv, S, Dh], written at `lengths`; None where no expert looks at keys.
        values: as keys, with its strides.
        state: the linear state [B, Hkv, Dh, Dh + 1] float32, advanced in place; None where no
            expert is linear.
        route: [B, 1, R], a choice for each of R units of H / R neighbouring query heads; one that
            is not in 0 .. num_experts - 1 is a device-side assertion.
        lengths: [B] tokens stored.
        native: indices of full, linear and local among the experts, -1 where absent.
        window: of the local expert.
        gated: the gated expert, if there is one.
        num_experts: how many a route chooses from.
        slots: of the store, those in use, by default all; a longer row is a device-side assertion.
        ring: position p is in slot p mod slots, and no expert looks further back than that.
        held: the store has the new key and value, and `lengths` counts them; k, v are not read.
        seen: bool [B, S], which stored keys are seen at all; None: all.
        sink_end: `local` sees what is seen before it, too: integer [B] or one for all; 0: none.
    """
    (B, H, _, dim), Hkv = q.shape, k.shape[1]
    stored = keys if keys is not None and values is not None else k
    slots = stored.shape[2] if slots is None else slots
    splits = _stretches(stored.shape[2], B * Hkv)
    D, group = head_size(dim), H // Hkv
    out = torch.empty(B, H, 1, dim, device=q.device, dtype=q.dtype)
    partial = torch.empty(B, H, splits, D, device=q.device, dtype=torch.float32)
    partial_lse = torch.empty(B, H, splits, device=q.device, dtype=torch.float32)
    none = GatedStep(-1, partial, partial, partial, partial)  # never read
    number, gated_state, gate, bias, log_scale = none if gated is None else gated
    strides = [s for x in (q, k, v, plain_q, plain_k) for s in x.stride()[:2]]
    ways, unit = (route.stride(0), route.stride(2)), H // route.shape[2]
    rows, of_rows = max(16, power_of_2(group)), isinstance(sink_end, Tensor)
    fixed = {"SPLITS": splits, "ROWS": rows, "BN": 64 if D <= 64 else 32, "DIM": dim, "D": D}
    fixed["num_warps"] = 4
    launch(
        decode_kernel, (splits + (state is not None) + group * (gated is not None), Hkv, B),
        q, k, v, plain_q, plain_k, stored, stored if values is None else values,
        partial if state is None else state,
        gated_state, gate, bias, log_scale, route, lengths, out, partial, partial_lse,
        route if seen is None else seen, sink_end if of_rows else lengths, *strides,
        *stored.stride()[:3], *ways, 0 if seen is None else seen.stride(0), lengths.stride(0),
        H, group, unit, slots, *native, number, window, 0 if of_rows else sink_end,
        LOG2_E / dim**0.5,
        LINEAR=state is not None, GATED=gated is not None, STORE=keys is not None and not held,
        RING=ring, HELD=held, MASKED=seen is not None, SINKS=2 if of_rows else int(sink_end > 0),
        BC=min(D, STATE_ENTRIES // D), PRECISION=precision(q), num_stages=3, **fixed,
    )  # fmt: skip
    launch(
        join_kernel, (H, B),
        partial, partial_lse, route, lengths, out, *ways, lengths.stride(0), H, group, unit,
        slots if keys is not None and not ring else 2**31 - 1,
        num_experts, native[0], native[2], window, HELD=held, **fixed,
    )  # fmt: skip
    return out
