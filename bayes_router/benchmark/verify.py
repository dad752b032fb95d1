"""No speed-up before the results are right: every backend against the float64 reference on the device that is timed."""

import torch
from torch import Tensor

from bayes_router.attention.cache import LayerCache
from bayes_router.attention.dispatch import Backend, available_backends, routed_attention
from bayes_router.benchmark.cases import WINDOW, Shape, built, draw_inputs, draw_route

SHAPE = Shape(2, 4, 777, 64)
MIX = "25/45/30"


def verify(device: torch.device) -> list[Backend]:
    """The backends of this device, each compared in values and gradients; decoding from a cache in values.

    Raises:
        ValueError: one disagrees; no speed-up may be reported then.
    """
    backends: list[Backend] = [b for b in available_backends(device) if b is not Backend.REFERENCE]
    for run in (1, 50):
        inputs = draw_inputs(SHAPE, device, grad=True)
        q, k, v = (x.detach().double().requires_grad_() for x in inputs)
        route = draw_route(MIX, SHAPE.B, SHAPE.T, run).to(device)
        want = routed_attention(q, k, v, route, window=WINDOW, backend="reference")
        weight = torch.randn_like(inputs[0])
        true = dict(zip(("dq", "dk", "dv"), torch.autograd.grad((want * weight.double()).sum(), (q, k, v)), strict=True))
        for backend in backends:
            with torch.no_grad():
                _compare(backend, device, "out", routed_attention(*inputs, route, window=WINDOW, backend=backend), want)
            if backend is not Backend.SHORT:  # which computes no gradients
                out = routed_attention(*inputs, route, window=WINDOW, backend=backend)
                _compare(backend, device, "out", out, want)
                for name, found in zip(true, torch.autograd.grad((out * weight).sum(), inputs), strict=True):
                    _compare(backend, device, name, found, true[name])
        _compare("the cache", device, "out", _decoded(inputs, route), want[:, :, -2:])
    return backends


@torch.no_grad()
def _decoded(inputs: tuple[Tensor, Tensor, Tensor], route: Tensor, steps: int = 2) -> Tensor:
    """The last `steps` tokens, one at a time after all others: [B, H, steps, Dh]."""
    q, k, v = inputs
    cache = LayerCache(built(SHAPE), SHAPE.B, SHAPE.T, SHAPE.H, device=q.device, dtype=q.dtype)
    bounds = [0, *range(SHAPE.T - steps, SHAPE.T + 1)]
    parts = [
        cache.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], route[:, a:b])
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(parts[1:], 2)


def _compare(who: Backend | str, device: torch.device, what: str, got: Tensor, want: Tensor) -> None:
    limit = 2e-2 if device.type == "cuda" else 1e-4
    error = float((got.detach().double() - want.detach()).norm() / want.detach().norm())
    name = who.value if isinstance(who, Backend) else who
    if not error < limit:
        raise ValueError(
            f"bench: expected results within {limit:g} of the float64 reference; {name} on {device}: {what} is off by "
            f"{error:.1e}; no speed-up is reported; `python -m pytest tests/attention tests/gpu` shows where"
        )
