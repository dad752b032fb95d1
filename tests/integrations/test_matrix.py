"""Every architecture: save and load, padded beams, assisted generation.

Also packed documents, and bfloat16 with both kernels.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_router.integrations.calls import layer
from bayes_router.integrations.patching import load_patch, patch
from tests.integrations.tiny_models import (
    ALL,
    DECODERS,
    ENCODERS,
    left_padded,
    patched,
    tiny,
    tokens,
)

GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
FAST = ("gpt2", "llama", "gemma2", "falcon")  # of what takes long; the others are marked slow
EAGER = [name for name in ALL if not name.startswith("falcon")]  # Falcon is served under sdpa alone
# read packed documents as one, unpatched too
TOGETHER = ("falcon", "falcon grouped", "falcon alibi", "opt", "gpt_oss")
# a soft cap and sinks need eager
SDPA = [name for name in ALL if name not in ("gemma2", "gpt_oss")]


def fewer(names: Iterable[str], *more: Any) -> list[Any]:
    return [
        pytest.param(name, *more, marks=[] if name in FAST else pytest.mark.slow) for name in names
    ]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_saved_patch_routes_another_copy_alike(name: str, tmp_path: Path) -> None:
    model, router = patched(name, sinks=1)
    ids = tokens()
    before = router(ids)
    router.save(tmp_path)
    other = tiny(name)
    loaded = load_patch(other, tmp_path)
    after = loaded(ids)
    assert torch.equal(after.route, before.route) and torch.equal(after.logits, before.logits)
    assert loaded.settings == router.settings and len(before.route.unique()) > 1


@pytest.mark.parametrize("name", fewer(DECODERS))
@torch.no_grad()
def test_padded_beams_equal_those_without_a_cache(name: str) -> None:
    model, _ = patched(name, sinks=1)
    ids, mask, _ = left_padded(2, 14)
    beams = {**GREEDY, "num_beams": 2, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize("name", fewer(DECODERS))
@torch.no_grad()
def test_assisted_generation_equals_greedy(name: str) -> None:
    model, _ = patched(name)
    ids = tokens(1, 10).repeat(1, 2)
    greedy = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), greedy)
    assert torch.equal(model.generate(ids, assistant_model=tiny(name, seed=1), **GREEDY), greedy)


@pytest.mark.parametrize("name", fewer(DECODERS))
@torch.no_grad()
def test_packed_documents_stay_apart_where_the_model_keeps_them_apart(name: str) -> None:
    first, second = tokens(1, 13), tokens(1, 17, seed=5)
    packed = torch.cat([first, second], 1)
    inputs = {
        "position_ids": torch.cat([torch.arange(13), torch.arange(17)])[None],
        "use_cache": False,
    }
    plain = tiny(name)
    alone = [plain(part).logits for part in (first, second)]
    whole = plain(packed, **inputs).logits
    apart = all(
        torch.allclose(x, y, atol=1e-4)
        for x, y in zip(whole.split([13, 17], 1), alone, strict=True)
    )
    _, router = patched(name, sinks=2)
    assert torch.equal(router(packed, force="full", **inputs).logits, whole)
    assert apart == (name not in TOGETHER)
    if not apart:
        return
    together = router(packed, **inputs)
    for part, rows in ((first, slice(0, 13)), (second, slice(13, 30))):
        expected = router(part)
        assert torch.equal(together.route[:, :, rows], expected.route)
        torch.testing.assert_close(together.logits[:, rows], expected.logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "kernel"), [*((n, "sdpa") for n in SDPA), *fewer(EAGER, "eager")])
@torch.no_grad()
def test_full_is_exact_in_bfloat16_with_padding_on_either_side(name: str, kernel: str) -> None:
    model = tiny(name).bfloat16()
    if not name.startswith("falcon"):
        model.set_attn_implementation(kernel)
    left, mask, _ = left_padded()
    batches = [(tokens(), None), (left, mask), (left.flip(1), mask.flip(1))]
    before = [model(ids, attention_mask=shown).logits for ids, shown in batches]
    router = patch(model, window=6)
    for ids, shown in batches:
        # unfitted: by its controllers
        assert torch.equal(model(ids, attention_mask=shown).logits, before.pop(0))
    assert router(tokens(), "mean").concentration.dtype == torch.float32


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoders_route_padded_batches_in_bfloat16(name: str) -> None:
    _, router = patched(name)
    router.model.bfloat16()
    ids, mask, _ = left_padded()
    out = router(ids.flip(1), attention_mask=mask.flip(1))
    assert (
        out.logits.dtype == torch.bfloat16
        and out.logits.isfinite().all()
        and len(out.route.unique()) == 3
    )


@torch.no_grad()
def test_a_pass_reads_its_padding_once_for_all_layers(monkeypatch: Any) -> None:
    model, router = patched("llama", experts=("full", "local"))
    read: list[Tensor] = []
    find = layer._texts._read
    monkeypatch.setattr(
        layer._texts, "_read", lambda padding: (read.append(padding), find(padding))[1]
    )
    for batch, seed in enumerate((1, 2)):
        ids, mask, lengths = left_padded(seed=seed)
        ids, mask = ids[batch:], mask[batch:]
        padded = model(ids, attention_mask=mask).logits
        for row, length in zip(range(len(ids)), lengths[batch:], strict=True):
            alone = model(ids[row : row + 1, -length:]).logits
            torch.testing.assert_close(padded[row, -length:], alone[0], rtol=1e-4, atol=1e-5)
        assert len(read) == batch + 1 and len(router.layers) > 1
