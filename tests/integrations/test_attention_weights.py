"""output_attentions: the original's where every token is on full.

Refused by name where tokens are routed.
"""

from typing import Any

import pytest
import torch

from bayes_router.integrations.patching import patch
from tests.integrations.tiny_models import ALL, scatter_routes, tiny, tokens

SERVED_BY_EAGER = [name for name in ALL if not name.startswith("falcon")]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_full_gives_the_weights_of_the_original_and_routed_refuses(name: str) -> None:
    model, ids = tiny(name), tokens()
    if name in SERVED_BY_EAGER:
        model.set_attn_implementation("eager")
    before = model(ids, output_attentions=True)
    assert len(before.attentions) == 2
    router = patch(model, window=6)
    after = model(ids, output_attentions=True)  # unfitted
    assert torch.equal(after.logits, before.logits) and len(after.attentions) == 2
    assert all(torch.equal(x, y) for x, y in zip(after.attentions, before.attentions, strict=True))
    scatter_routes(router)
    with pytest.raises(
        ValueError, match="output_attentions: expected False where tokens are routed"
    ):
        model(ids, output_attentions=True)
    model(ids)  # what was refused has left nothing behind
    router.force("full")
    assert len(model(ids, output_attentions=True).attentions) == 2
    router.unpatch()
    assert len(model(ids, output_attentions=True).attentions) == 2


@torch.no_grad()
def test_weights_that_the_configuration_asks_for_are_refused_too() -> None:
    model, ids = tiny("llama"), tokens()
    model.set_attn_implementation("eager")
    router = patch(model, window=6)
    model.config._output_attentions = True
    assert len(model(ids).attentions) == 2
    scatter_routes(router)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids)


@pytest.mark.parametrize("full", [True, False])
@torch.no_grad()
def test_sdpa_has_no_weights_patched_or_not(full: bool, caplog: Any) -> None:
    model, ids = tiny("llama"), tokens()
    assert model(ids, output_attentions=True).attentions == ()
    router = patch(model, window=6)
    if full:
        assert model(ids, output_attentions=True).attentions == ()
    else:
        scatter_routes(router)
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids, output_attentions=True)


@torch.no_grad()
def test_generation_refuses_weights_while_tokens_are_routed() -> None:
    model = tiny("gpt2")
    model.set_attn_implementation("eager")
    settings: dict[str, Any] = {
        "max_new_tokens": 3,
        "output_attentions": True,
        "return_dict_in_generate": True,
    }
    before = model.generate(tokens(1, 8), pad_token_id=0, **settings)
    router = patch(model, window=6)
    after = model.generate(tokens(1, 8), pad_token_id=0, **settings)
    for x, y in zip(after.attentions, before.attentions, strict=True):
        assert len(x) == 2 and all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    scatter_routes(router)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(tokens(1, 8), pad_token_id=0, **settings)
