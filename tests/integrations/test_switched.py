"""Autocast where a patch is made and fitted, and attention switched after the patch.

Also torch.export.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import bayes_router
from bayes_router import ModelConfig, RoutedLanguageModel
from bayes_router.integrations.huggingface import interface
from bayes_router.integrations.patching import patch
from tests.integrations.tiny_models import patched, scatter_routes, tiny, tokens

TEXT = torch.randint(3, 101, (400,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "kernel"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("bert", "sdpa")],
)
@torch.no_grad()
def test_a_patch_made_under_autocast_is_the_original_on_full(
    name: str, kernel: str, dtype: torch.dtype
) -> None:
    model, ids = tiny(name), tokens()
    model.set_attn_implementation(kernel)
    with torch.autocast("cpu", dtype):
        before = model(ids).logits
        router = patch(model, window=6)
        assert torch.equal(model(ids).logits, before)
        scatter_routes(router)
        routed = router(ids)
    exact = router(ids)
    same = routed.route == exact.route  # posteriors are float32 under autocast too
    assert (
        same.float().mean() > 0.95
        and len(exact.route.unique()) > 1
        and routed.concentration.dtype == torch.float32
    )
    assert (routed.logits.float() - exact.logits)[
        same.all(0).all(-1)
    ].abs().median() < 0.01 * exact.logits.abs().max()


@pytest.mark.parametrize("weights_lr", [0.0, 1e-2])
def test_a_fit_under_autocast_sees_its_own_steps(weights_lr: float) -> None:
    rows = []
    for cached in (True, False):
        router = patch(tiny("llama"), window=6)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            settings = {"steps": 4, "distil_steps": 2, "warmup": 0, "context": 20, "batch_size": 2}
            rows.append(
                router.fit(TEXT, lr=0.1, controller_lr=0.1, weights_lr=weights_lr, **settings)
            )
    assert rows[0].equals(rows[1]) and rows[0]["nll"].nunique() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_own_models_generate_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = ("full", "linear", "gated", "local", "mapped")
    model = RoutedLanguageModel(
        ModelConfig(50, d_model=32, num_layers=2, num_heads=2, experts=experts, window=4)
    ).eval()
    for one in model.controller.layers:
        torch.nn.init.normal_(one.out.weight, std=2.0)
    prompt = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype):
        out, route = bayes_router.generate(model, prompt, 5)
        assert len(list(bayes_router.stream(model, prompt, 5))) == 5
        cache, parts = model.network.new_cache(2, 17), []
        for part in (out[:, :12], *out[:, 12:].split(1, 1)):
            parts.append(model(part, cache=cache).logits)
        whole = model(out).logits
    assert len(route.unique()) > 2 and parts[0].dtype == dtype
    assert (torch.cat(parts, 1) - whole).abs().max() < 0.05 * whole.abs().max()


def local_and_full(model: Any, router: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    router.force("local")
    local = model(ids).logits
    router.force("full")
    return local, model(ids).logits


@pytest.mark.parametrize("how", ["method", "config"])
@pytest.mark.parametrize(("before", "after"), [("sdpa", "eager"), ("eager", "sdpa")])
@torch.no_grad()
def test_routing_goes_on_under_a_kernel_that_is_switched_to(
    before: str, after: str, how: str
) -> None:
    model, ids = tiny("llama"), tokens()
    model.set_attn_implementation(before)
    router = patch(model, window=4)
    local, full = local_and_full(model, router, ids)
    if how == "method":
        model.set_attn_implementation(after)
    else:
        model.config._attn_implementation = after
    again = local_and_full(model, router, ids)
    assert model.config._attn_implementation == interface.NAME.format(after)
    torch.testing.assert_close(torch.stack(again), torch.stack([local, full]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(local, full, atol=1e-3) and patch(model, window=4) is router
    router.unpatch()
    assert model.config._attn_implementation == after  # what it was switched to stays


@torch.no_grad()
def test_a_kernel_that_cannot_be_routed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = patched("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation.*flash_attention_2"):
        model(tokens())
    model.config._attn_implementation_internal = "sdpa"
    # as where a module names no configuration
    monkeypatch.setattr(interface, "follow_switch", lambda module: None)
    with pytest.raises(ValueError, match="attn_implementation.*switched"):
        model(tokens())


def exported(model: Any, ids: Tensor, strict: bool = False) -> Tensor:
    inputs = {"input_ids": ids, "use_cache": False}
    return torch.export.export(model, (), inputs, strict=strict).module()(**inputs).logits


@pytest.mark.parametrize("force", ["full", "local", "mapped"])
@torch.no_grad()
def test_forced_routes_export(force: str) -> None:
    model, router = patched("llama")
    router.force(force)
    torch.testing.assert_close(
        exported(model, tokens()), model(tokens()).logits, atol=1e-5, rtol=1e-4
    )
    assert interface._padding._last is None or not isinstance(
        interface._padding._last[1], torch._subclasses.FakeTensor
    )


def test_routes_of_the_data_are_not_exported() -> None:
    model, _ = patched("llama")
    with pytest.raises(ValueError, match="torch.export: expected every token on one expert"):
        exported(model, tokens())
