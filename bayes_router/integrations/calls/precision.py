"""Autocast around a patched layer.

Its own kernel runs under it, what the patch adds keeps the precision that it needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from bayes_router.integrations.calls.call import AttentionCall


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast in here: posteriors and sums over the past are float32 at least."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def uncached(device: torch.device) -> Iterator[None]:
    """Autocast as it is, but no cast weight is kept.

    One that was kept would not see the steps of an optimiser.
    """
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False):
        yield


def cast(call: AttentionCall) -> AttentionCall:
    """The call for use outside of the autocast that it was made under.

    In its dtype, as the layer's kernel would cast it.

    Rotary positions leave queries and keys in float32 beside narrower values, and a cache may widen
    either.
    """
    kind, inner = call.q.device.type, call.kernel
    if not torch.is_autocast_enabled(kind):
        return call
    dtype = torch.get_autocast_dtype(kind)

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(kind, dtype):
            return inner(q, k, v, mask)

    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, kernel=kernel)
