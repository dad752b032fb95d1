"""Patches that route by key head or query head.

Unchanged on full, each unit its own expert, decoded, fitted, saved.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_router.config import PriorConfig
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.routing.cost import token_cost
from bayes_router.routing.tilt import tilted_moments
from tests.integrations.tiny_models import VOCAB, left_padded, patched, tiny, tokens

TEXT = torch.randint(3, VOCAB, (200,), generator=torch.Generator().manual_seed(0)).repeat(6)
QUICK = {"steps": 6, "distil_steps": 4, "context": 32, "batch_size": 2}
MODELS = [
    "llama",
    "gpt2",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "falcon",
    "falcon alibi",
    "bert",
]
BY = ["kv_head", "head"]


def units(router: Any) -> int:
    return int(router.config.num_units)


@pytest.mark.parametrize("route_by", BY)
@pytest.mark.parametrize("name", MODELS)
def test_a_hard_route_is_the_one_hot_mixture(name: str, route_by: str) -> None:
    """Choices execute what weights of one and zero mix.

    By the dispatcher, by rows, and with padding.
    """
    model, router = patched(name, route_by=route_by)
    ids, mask, _ = left_padded()
    with torch.no_grad():
        model(ids, attention_mask=mask)
    hard = torch.stack([router.last.executed[i] for i in range(len(router.layers))])
    assert hard.shape == (len(router.layers), 3, 24, units(router))
    assert units(router) == 1 or bool((hard != hard[..., :1]).any())
    soft = torch.nn.functional.one_hot(hard, len(router.experts)).float()
    outs = []
    for force in (hard, soft):
        router.force(force)
        with torch.no_grad():
            outs.append(model(ids, attention_mask=mask)[0])
    real = mask.bool()
    torch.testing.assert_close(outs[0][real], outs[1][real], rtol=1e-3, atol=1e-4)
    router.force("full")
    with torch.no_grad():
        full = model(ids, attention_mask=mask)[0]
        router.unpatch()
        assert torch.equal(full, model(ids, attention_mask=mask)[0])
    assert not torch.allclose(full[real], outs[0][real], atol=1e-3)


@pytest.mark.parametrize("route_by", BY)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3"])
def test_steps_behind_a_cache_equal_the_full_pass(name: str, route_by: str) -> None:
    model, router = patched(name, route_by=route_by, sinks=2)
    ids = tokens(B=3, T=30)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :21], use_cache=True)
        got = [out.logits]
        for t in range(21, 30):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), whole, rtol=1e-3, atol=1e-3)


def test_a_step_reads_the_keys_of_the_heads_that_ask_alone() -> None:
    """Keys of a key head whose query heads are all on local are NaN beyond the window."""
    model, router = patched("llama", route_by="head", experts=("full", "local"), window=6)
    ids = tokens(B=2, T=30)
    route = torch.ones(2, 2, 1, 4, dtype=torch.int64)
    # row 0: key head 0; row 1: one query head of key head 1
    route[:, 0, :, :2], route[:, 1, :, 3] = 0, 0
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        router.force(route)
        want = model(ids[:, :1], past_key_values=past, use_cache=True).logits
        past.crop(-1)
        for layer in past.layers:
            for row, head in ((0, 1), (1, 0)):
                layer.keys[row, head, :24], layer.values[row, head, :24] = torch.nan, torch.nan
        got = model(ids[:, :1], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route_by", BY)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_later_tokens_change_nothing_in_any_unit(name: str, route_by: str) -> None:
    _, router = patched(name, route_by=route_by, sinks=2)
    ids, later = tokens(), tokens()
    later[:, 25:] = (later[:, 25:] + 7) % VOCAB
    with torch.no_grad():
        for mode in ("hard", "mean"):
            before, after = router(ids, mode).logits, router(later, mode).logits
            torch.testing.assert_close(before[:, :25], after[:, :25], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route_by", BY)
def test_fitted_budgeted_saved_and_loaded(route_by: str, tmp_path: Path) -> None:
    router = patch(tiny("llama"), window=6, route_by=route_by, context=32)
    frame = router.fit(TEXT, **QUICK)
    assert frame[["nll", "kl"]].notna().all().all()
    moved = [
        c.out.weight.view(units(router), 3, -1).abs().amax((1, 2)) for c in router.controller.layers
    ]
    assert all(bool((m > 0).all()) for m in moved)  # every unit learns
    spent = router.set_budget(0.7, context=32, limit=256, tolerance=0.2)
    with torch.no_grad():
        out = router(TEXT[None, :64])
    assert spent == pytest.approx(0.7, abs=0.2) and out.route.shape[-1] == units(router)
    assert len(router.statistics()[0].units) == units(router)
    router.save(tmp_path / "patch")
    again = load_patch(tiny("llama"), tmp_path / "patch")
    assert again.settings.route_by == route_by and again.policy == router.policy
    with torch.no_grad():
        assert torch.equal(again(TEXT[None, :64]).logits, out.logits)


def test_a_budget_in_bytes_is_what_key_heads_read() -> None:
    _, router = patched("llama", route_by="head", experts=("full", "local"), window=6, context=32)
    spent = router.set_budget(0.6, TEXT, context=32, limit=256, by="bytes", tolerance=0.02)
    with torch.no_grad():
        route = torch.cat([router(part[None]).route for part in TEXT[: 32 * 8].split(32)], 1)
    reads = torch.tensor([1.0, 6 / 32])
    assert float(token_cost(route, reads, sharing=2).mean()) == pytest.approx(spent, abs=1e-5)
    assert float(token_cost(route, reads).mean()) < spent
    assert spent == pytest.approx(0.6, abs=0.02)


def test_patches_from_before_units_load_by_layer(tmp_path: Path) -> None:
    patch(tiny("llama"), window=6).save(tmp_path / "old")
    path = tmp_path / "old" / "router.json"
    saved = json.loads(path.read_text())
    del saved["settings"]["route_by"]
    path.write_text(json.dumps(saved))
    assert load_patch(tiny("llama"), tmp_path / "old").settings.route_by == "layer"


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(
        ValueError, match="route_by: expected one of head, kv_head, layer; got 'token'"
    ):
        patch(tiny("llama"), route_by="token")


@pytest.mark.parametrize("route_by", BY)
def test_the_kl_of_a_token_is_the_sum_over_its_units(route_by: str) -> None:
    """Each unit's own KL, the tilt by its price included, written out with torch.distributions."""
    _, router = patched("llama", route_by=route_by, prior=PriorConfig(price=3.0))
    with torch.no_grad():
        router(tokens())
        prior, tilt = router.prior.concentration, router.price * router.layer_cost
        log_z = tilted_moments(prior, tilt).log_normaliser
        total = 0.0
        for layer, a in router.last.concentration.items():
            q, p = (
                torch.distributions.Dirichlet(a),
                torch.distributions.Dirichlet(prior[layer].to(a)),
            )
            kl = torch.distributions.kl_divergence(q, p) + q.mean @ tilt[layer].to(a) + log_z[layer]
            assert kl.shape == (*tokens().shape, units(router))
            total += float(kl.sum(-1).mean())
        assert units(router) > 1 and float(router.kl()) == pytest.approx(total, rel=1e-4)
