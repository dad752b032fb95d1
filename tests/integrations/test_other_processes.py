"""What was patched in a process that was spawned.

Also behind DistributedDataParallel, and under PEFT's adapters.
"""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bayes_router.integrations.patch.binding import router_of
from bayes_router.integrations.patching import load_patch, patch
from tests.integrations.test_passes import draw, routed_encoder
from tests.integrations.tiny_models import patched, scatter_routes, tiny, tokens
from tests.tiny import tiny_batch, tiny_model


@torch.no_grad()
def answers(model: Any, router: Any, encoder: Any, own: Any) -> list[Tensor]:
    """What each of them says, and how the first was routed."""
    said = [model(tokens()).logits, router(tokens()).logits, encoder(draw())]
    said += [
        own(tiny_batch()[0], mode="hard").logits,
        torch.stack(list(router.last.executed.values())),
    ]
    return said


def in_the_other(pipe: Any, things: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    pipe.send([x.numpy() for x in answers(*things)])


@pytest.mark.slow  # a process that imports torch and transformers
def test_a_spawned_process_routes_alike() -> None:
    """As loaders of data are on Windows and macOS, and whatever has touched CUDA.

    Everything goes by pickle.
    """
    model, router = patched("llama")
    things = (model, router, routed_encoder()[0].eval(), tiny_model().eval())
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=in_the_other, args=(there, things))
    process.start()
    try:
        assert here.poll(120)
        found = [torch.from_numpy(x) for x in here.recv()]
    finally:
        process.join(20)
    assert process.exitcode == 0
    for one, other in zip(found, answers(*things), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_model_inside_distributed_data_parallel_is_routed_and_trained(tmp_path: Path) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        plain, model = tiny("llama"), tiny("llama")
        wrapped = DistributedDataParallel(model)
        router = patch(wrapped, window=6)
        scatter_routes(router)
        assert router.model is model and router_of(wrapped) is router
        wrapped.train()
        router.mode = None
        torch.manual_seed(0)
        out = wrapped(input_ids=tokens(), labels=tokens())
        (out.loss + 0.01 * router.kl()).backward()
        assert all(p.grad is not None and p.grad.any() for p in router.controller.parameters())
        assert all(p.grad is not None for p in model.parameters())
        wrapped.eval()
        routed = wrapped(tokens()).logits
        router.save(tmp_path / "patch")
        router.unpatch()
        assert torch.equal(wrapped(tokens()).logits, plain(tokens()).logits)
        load_patch(plain, tmp_path / "patch")
        assert torch.equal(plain(tokens()).logits, routed)
    finally:
        dist.destroy_process_group()


class LoRALinear(nn.Module):
    """As PEFT's: the layer of before, and beside it a product of two thin matrices."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.normal_(self.lora_B.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Tuner(nn.Module):
    """As PEFT's LoraModel inside its PeftModel."""

    def __init__(self, model: nn.Module, inner: str):
        super().__init__()
        setattr(self, inner, model)
        self._inner = inner

    def forward(self, *args: Any, **named: Any) -> Any:
        return getattr(self, self._inner)(*args, **named)


def adapted(kind: str) -> tuple[Any, Any]:
    """A Llama with adapters on queries and values, and what it is wrapped in."""
    torch.manual_seed(0)
    model = tiny("llama")
    if kind == "peft":
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        return model, peft.get_peft_model(model, settings)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRALinear(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LoRALinear(layer.self_attn.v_proj)
    return model, Tuner(Tuner(model.requires_grad_(True), "model"), "base_model")


@pytest.mark.parametrize("kind", ["of its structure", "peft"])
def test_a_model_under_adapters_is_routed_trained_and_comes_back(kind: str, tmp_path: Path) -> None:
    model, wrapped = adapted(kind)
    wrapped.eval()
    plain = wrapped(input_ids=tokens()).logits
    router = patch(wrapped, window=6)
    assert router.model is model and torch.equal(wrapped(input_ids=tokens()).logits, plain)
    scatter_routes(router)
    router.train()
    (wrapped(input_ids=tokens(), labels=tokens()).loss + 0.01 * router.kl()).backward()
    adapters = {name: p for name, p in wrapped.named_parameters() if "lora_" in name}
    assert adapters and all(p.grad is not None and p.grad.any() for p in adapters.values())
    assert all(p.grad is not None for p in router.controller.parameters())
    wrapped.eval()
    with torch.no_grad():
        routed = wrapped(input_ids=tokens()).logits
        assert not torch.allclose(routed, plain, atol=1e-3)
        router.save(tmp_path)
        router.unpatch()
        assert torch.equal(wrapped(input_ids=tokens()).logits, plain)
        load_patch(wrapped, tmp_path)
        assert torch.equal(wrapped(input_ids=tokens()).logits, routed)
    added = [
        name for name, _ in wrapped.named_parameters() if "bayes" in name or "controller" in name
    ]
    assert not added  # what the patch added is no part of the adapters' state
