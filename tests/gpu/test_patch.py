"""A patched model on a CUDA device.

Routed passes against the same on the CPU, and how often they wait for the device.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_router.integrations.huggingface.graphs import Graphs
from bayes_router.integrations.patching import patch
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


def small(cuda: bool = True) -> tuple[Any, Any]:
    """A Llama with heads of 16, patched with full and local, whose controllers send tokens
    to both.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    router = patch(model, window=20, sinks=3, experts=NAMES, route_by="head")
    router.full_up_to = 0
    for layer in router.controller.layers:
        layer.get_parameter("out.weight").data.normal_()
        layer.get_parameter("out.bias").data.zero_()
    return (model.cuda(), router) if cuda else (model, router)


@pytest.mark.parametrize("policy", [Budget, Conservative])
@pytest.mark.parametrize("new", [300, 1])
def test_nothing_of_a_routed_pass_or_step_waits(policy: Any, new: int) -> None:
    model, router = small()
    router.policy = policy(tuple(router.cost_ratio.tolist()), price=0.1)
    ids = tokens(1, 300).cuda()

    @torch.no_grad()
    def run() -> None:
        past = model(ids, use_cache=True).past_key_values if new == 1 else None
        model(ids[:, :new], past_key_values=past, use_cache=True)

    routed = waits(run)
    router.force("full")
    assert routed == waits(run)


@torch.no_grad()
def test_choices_and_logits_are_those_of_the_cpu() -> None:
    ids = tokens(2, 200)
    (here, ours), (there, theirs) = small(), small(cuda=False)
    found, expected = here(ids.cuda()).logits.cpu(), there(ids).logits
    for layer, choice in theirs.last.executed.items():
        assert 0.1 < float((choice == 0).float().mean()) < 0.9
        assert torch.equal(ours.last.executed[layer].cpu(), choice)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_graphs_continue_a_text_as_a_growing_cache_does() -> None:
    """A prompt that is padded to its bucket, and steps behind it.

    A static cache without a graph, left padding included.
    """
    model, router = small()
    ids = tokens(2, 90).cuda()
    expected = model(ids).logits
    graphs = Graphs(model, 128, batch=2, bucket=64)
    for length in (70, 80):  # the second from the same graphs
        torch.testing.assert_close(
            graphs.prefill(ids[:, :length]), expected[:, length - 1], rtol=1e-4, atol=1e-4
        )
        for t in range(length, length + 5):
            torch.testing.assert_close(
                graphs.step(ids[:, t, None]), expected[:, t], rtol=1e-4, atol=1e-4
            )
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    static = model.generate(ids, cache_implementation="static", **settings)
    assert torch.equal(static, model.generate(ids, **settings))


@torch.no_grad()
def test_a_short_text_is_all_on_full_and_says_so() -> None:
    model, router = small()
    ids = tokens(2, 50).cuda()
    routed = model(ids).logits
    router.full_up_to = 50
    found = model(ids).logits
    assert router.last.on_full == {0, 1}
    with pytest.raises(ValueError, match="full_up_to"):
        router.statistics()
    router.unpatch()
    assert torch.equal(found, model(ids).logits)
    assert not torch.equal(found, routed)
