"""Linear, gated and local attention of every token by the Triton kernels.

They are operators that torch.compile takes whole.

Triton is imported only where an operator runs. Static shapes, no host synchronisation, memory from
torch alone: an operator may be captured into a CUDA graph.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from bayes_router.attention.kernels.capability import (
    LOG2_E,
    feature_dtype,
    head_size,
    packed,
    padded,
)
from bayes_router.attention.kernels.operator import operator


def features(
    q: Tensor, k: Tensor, gate: Tensor, bias: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `GatedLinearAttention.features`, padded with zeros to the head size of the kernels."""
    phi_q, phi_k, log_gate = _features(q, k, gate, bias, log_scale)
    return phi_q, phi_k, log_gate


def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor | None = None) -> Tensor:
    """Linear attention [B, H, T, Dh]; formulas in `linear`.

    With log gates [B, H, T] q and k are features, and there is a key for each query head.
    """
    nothing = -torch.inf if log_gate is None else 0.0  # the feature map sends -inf to 0
    out: Tensor = _linear(padded(q, nothing), padded(k, nothing), padded(v), log_gate)[0]
    return out[..., : v.shape[3]]


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int = 0) -> Tensor:
    """[B, H, T, Dh]: softmax attention over the last `window` keys and the first `sinks`."""
    out: Tensor = _local(
        padded(q), padded(k), padded(v), window, sinks, LOG2_E / q.shape[3] ** 0.5
    )[0]
    return out[..., : q.shape[3]]


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for out, laid out as [B, T, H, D], in v's dtype, and for one float32 a row."""
    B, H, T, D = q.shape
    out = torch.empty(B, T, H, D, device=q.device, dtype=v.dtype).transpose(1, 2)
    return out, torch.empty(B, H, T, device=q.device, dtype=torch.float32)


def _states(k: Tensor) -> tuple[Tensor, Tensor]:
    from bayes_router.attention.kernels.triton.call import chunk_size
    from bayes_router.attention.kernels.triton.launch_linear import empty_states

    return empty_states(k, chunk_size(k.shape[2]))


@operator("bayes_router::linear_attention")
def _linear(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, denominators, S, z, sums of the log gates)."""
    from bayes_router.attention.kernels.triton.call import Queries, tiles
    from bayes_router.attention.kernels.triton.launch_linear import decays, linear_forward

    q, k, v = packed(q), packed(k), packed(v)
    out, lse = _outputs(q, v)
    with torch.cuda.device_of(q):
        decay = decays(log_gate)
        s, z = _states(k)
        rows = Queries(lse, lse, sorted=False)
        linear_forward(q, k, v, decay, out, lse, rows, tiles(q.shape[3], q.dtype), (s, z))
    return out, lse, s, z, lse.new_empty(0, dtype=torch.float64) if decay is None else decay


@_linear.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_gate: Optional[Tensor]) -> tuple[Tensor, ...]:
    out, lse = _outputs(q, v)
    shape = (0,) if log_gate is None else log_gate.shape
    return out, lse, *_states(k), torch.empty(shape, device=q.device, dtype=torch.float64)


@operator("bayes_router::linear_attention_backward")
def _linear_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gated: bool,
    out: Tensor,
    lse: Tensor,
    s: Tensor,
    z: Tensor,
    decay: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the log gates (empty if not gated)."""
    from bayes_router.attention.kernels.triton.call import Queries, tiles
    from bayes_router.attention.kernels.triton.launch_linear import linear_backward

    q, k, v, dout = packed(q), packed(k), packed(v), packed(dout)
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    dlog_gate = torch.empty_like(lse) if gated else None
    with torch.cuda.device_of(q):
        linear_backward(
            q, k, v, decay if gated else None, out, dout, lse, delta, [s, z], dq, dk, dv,
            dlog_gate, Queries(lse, lse, sorted=False), tiles(q.shape[3], q.dtype),
        )  # fmt: skip
    return dq, dk, dv, lse.new_empty(0) if dlog_gate is None else dlog_gate


@_linear_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gated: bool, out: Tensor, lse: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    dq, dk, dv = (torch.empty_like(packed(x)) for x in (q, k, v))
    return dq, dk, dv, torch.empty_like(lse) if gated else lse.new_empty(0)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_gate = inputs
    ctx.gated = log_gate is not None
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_linear(
    ctx: Any, dout: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    q, k, v, *saved = ctx.saved_tensors
    dq, dk, dv, dlog_gate = _linear_backward(q, k, v, ctx.gated, *saved, dout)
    return dq, dk, dv, dlog_gate if ctx.gated else None


_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)


@operator("bayes_router::local_attention")
def _local(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, log2 of the softmax normalisers)."""
    from bayes_router.attention.kernels.triton.launch_local import local_forward

    q, k, v = packed(q), packed(k), packed(v)
    out, lse = _outputs(q, v)
    with torch.cuda.device_of(q):
        local_forward(q, k, v, out, lse, window, sinks, scale)
    return out, lse


@_local.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


@operator("bayes_router::local_attention_backward")
def _local_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from bayes_router.attention.kernels.triton.launch_local import local_backward

    q, k, v, dout = packed(q), packed(k), packed(v), packed(dout)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with torch.cuda.device_of(q):
        local_backward(q, k, v, out, lse, dout, dq, dk, dv, window, sinks, scale)
    return dq, dk, dv


@_local_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(packed(q)), torch.empty_like(packed(k)), torch.empty_like(packed(v))


def _save_local(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.window, ctx.sinks, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_local(
    ctx: Any, dout: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None, None
    return (
        *_local_backward(*ctx.saved_tensors, dout, ctx.window, ctx.sinks, ctx.scale),
        None,
        None,
        None,
    )


_local.register_autograd(_differentiate_local, setup_context=_save_local)


def _feature_outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, Tq, _), Tk, D = q.shape, k.shape[2], head_size(q.shape[3])
    phi_q, phi_k = (
        torch.empty(B, H, T, D, device=q.device, dtype=feature_dtype(q.dtype)) for T in (Tq, Tk)
    )
    return phi_q, phi_k, torch.empty(B, H, Tk, device=q.device, dtype=torch.float32)


@operator("bayes_router::gated_features")
def _features(
    q: Tensor, k: Tensor, gate: Tensor, bias: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(phi(q), phi(k), log gates)."""
    from bayes_router.attention.kernels.triton.features import features_forward

    found = _feature_outputs(q, k)
    with torch.cuda.device_of(q):
        features_forward(
            packed(q),
            packed(k),
            gate.contiguous(),
            bias.contiguous(),
            log_scale.contiguous(),
            *found,
        )
    return found


@_features.register_fake
def _(
    q: Tensor, k: Tensor, gate: Tensor, bias: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _feature_outputs(q, k)


@operator("bayes_router::gated_features_backward")
def _features_backward(
    q: Tensor,
    k: Tensor,
    gate: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    dphi_q: Tensor,
    dphi_k: Tensor,
    dlog_gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, gate, bias and log_scale."""
    from bayes_router.attention.kernels.triton.features import features_backward

    q, k = packed(q), packed(k)
    dq, dk, own = torch.empty_like(q), torch.empty_like(k), (gate, bias, log_scale)
    gate, bias, log_scale = (x.contiguous() for x in own)
    with torch.cuda.device_of(q):
        found = features_backward(
            q, k, gate, bias, log_scale, packed(dphi_q), packed(dphi_k), dlog_gate.contiguous(),
            dq, dk
        )  # fmt: skip
    dgate, dbias, dscale = (g.to(x.dtype) for g, x in zip(found, own, strict=True))
    return dq, dk, dgate, dbias, dscale


@_features_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    gate: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    dphi_q: Tensor,
    dphi_k: Tensor,
    dlog_gate: Tensor,
) -> tuple[Tensor, ...]:
    parameters = (
        torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (gate, bias, log_scale)
    )
    return torch.empty_like(packed(q)), torch.empty_like(packed(k)), *parameters


def _save_features(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_features(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _features_backward(*ctx.saved_tensors, *gradients)
    return found


_features.register_autograd(_differentiate_features, setup_context=_save_features)
