"""A patched model under torch.compile on a CUDA device: one graph, compiled steps, `generate`."""

from typing import Any

import pytest
import torch
from transformers import StaticCache

from tests.gpu.test_patch import small
from tests.integrations.tiny_models import tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@torch.no_grad()
def test_a_compiled_pass_is_the_pass() -> None:
    model, router = small()
    ids = tokens(2, 300).cuda()
    expected = model(ids).logits
    routes = dict(router.last.executed)
    found = torch.compile(model, fullgraph=True, dynamic=False)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(router.last.executed[i], route) for i, route in routes.items())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_behind_a_static_cache_are_the_steps(mode: str) -> None:
    model, _ = small()
    ids = tokens(2, 70).cuda()
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=96)
    model(ids[:, :60], past_key_values=cache)
    step = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    for t in range(60, 70):
        logits = step(ids[:, t, None], past_key_values=cache).logits[:, -1].clone()
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_compiles_behind_a_static_cache() -> None:
    model, _ = small()
    ids = tokens(2, 50).cuda()
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    asked["attention_mask"] = torch.ones_like(ids)
    asked["attention_mask"][1, :9] = 0
    static = model.generate(ids, cache_implementation="static", **asked)
    assert torch.equal(static, model.generate(ids, **asked))
