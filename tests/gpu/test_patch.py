"""A patched model on a CUDA device.

Routed passes against the same on the CPU, and how often they wait for the device.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_router.routing.policy import Budget, Conservative
from bayes_router.types import Route
from tests.gpu.waiting import waits
from tests.integrations.tiny_models import left_padded, patched, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("full", "local")


def fixed(experts: int, seed: int = 0) -> Route:
    """Routes drawn once a layer and shape, the same on every device."""

    def route(layer: int, hidden: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + layer)
        return torch.randint(experts, hidden.shape[:2], generator=generator).to(hidden.device)

    return route


@torch.no_grad()
def logits(device: str, names: tuple[str, ...], sinks: int, ids: Tensor, **inputs: Any) -> Tensor:
    model, router = patched("llama", experts=names, sinks=sinks)
    model.to(device)
    moved = {name: x.to(device) for name, x in inputs.items()}
    with router.routed_by(fixed(len(names))):
        out: Tensor = model(ids.to(device), **moved).logits
    return out.cpu()


@pytest.mark.parametrize("names", [NAMES, ("full", "mapped", "gated", "local")])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("T", [40, 2500])  # by the kernel for short texts and by the sorted one
def test_a_routed_pass_is_that_of_the_cpu(names: tuple[str, ...], sinks: int, T: int) -> None:
    ids = tokens(2, T)
    found, expected = (logits(device, names, sinks, ids) for device in ("cuda", "cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [NAMES, ("full", "mapped", "gated", "local")])
def test_a_padded_pass_is_that_of_the_cpu(names: tuple[str, ...]) -> None:
    ids, mask, _ = left_padded()
    found, expected = (
        logits(device, names, 0, ids, attention_mask=mask) for device in ("cuda", "cpu")
    )
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [Budget, Conservative])
@pytest.mark.parametrize("new", [300, 1])
def test_a_layer_waits_once_in_a_pass_and_in_a_step(policy: Any, new: int) -> None:
    """For the experts that its tokens took; nothing else of the router waits."""
    model, router = patched("llama", experts=NAMES)
    model.cuda()
    router.policy = policy(tuple(router.cost_ratio.tolist()), price=0.1)
    ids = tokens(1, 300).cuda()

    @torch.no_grad()
    def run() -> None:
        past = model(ids, use_cache=True).past_key_values if new == 1 else None
        model(ids[:, :new], past_key_values=past, use_cache=True)

    routed = waits(run)
    router.force("full")
    alone = waits(run)
    # a step stands behind a prompt
    assert routed - alone <= len(router.layers) * (2 if new == 1 else 1)
