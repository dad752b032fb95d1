"""The setting `graphs` of a patched model on a CUDA device: calls and `generate`, replayed."""

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
def test_calls_are_replayed_as_they_would_be_called() -> None:
    model, router = small()
    ids = tokens(2, 300).cuda()
    expected = model(ids).logits
    routes = {i: x.clone() for i, x in router.last.executed.items()}
    router.graphs = True
    for length in (300, 290, 70):
        found = model(ids[:, :length], use_cache=False).logits
        assert router.last.replayed
        torch.testing.assert_close(found, expected[:, :length], rtol=1e-4, atol=1e-4)
        taken = router.last.executed
        assert all(torch.equal(taken[i], x[:, :length]) for i, x in routes.items())
    grown = model(ids[:, :290]).past_key_values
    model(ids[:, :290].flip(1))  # writes over what the graph read, not over what it answered
    found = model(ids[:, 290:], past_key_values=grown).logits
    torch.testing.assert_close(found, expected[:, 290:], rtol=1e-4, atol=1e-4)
    cache = StaticCache(config=model.config, max_cache_len=320)
    model(ids[:, :290], past_key_values=cache)
    for t in range(290, 296):
        found = model(ids[:, t, None], past_key_values=cache).logits[:, 0]
        assert router.last.replayed
        torch.testing.assert_close(found, expected[:, t], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 9])
def test_generate_is_as_it_was(padded: int) -> None:
    model, router = small()
    ids = tokens(2, 90).cuda()
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(ids, do_sample=False, **asked)
    router.graphs = True
    for _ in range(2):
        found = model.generate(ids, cache_implementation="static", do_sample=False, **asked)
        assert router.last.replayed and torch.equal(found, expected)
    router.force("local")
    other = model.generate(ids, cache_implementation="static", do_sample=False, **asked)
    assert not router.last.replayed and not torch.equal(other, expected)
