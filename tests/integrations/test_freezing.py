"""Units that nobody moves.

Static routes, controllers that are not run, and a cache that is really freed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_router.integrations.huggingface import freezing
from bayes_router.integrations.huggingface.freed_cache import FreedLayer, cache_bytes
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.routing.policy import Argmax, Budget
from bayes_router.transformer.frozen import Frozen
from tests.integrations.tiny_models import VOCAB, tiny

WINDOW, SINKS = 6, 2
TEXT = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(0)).repeat(8)


def moved(route_by: str = "head", static: Any = None) -> Any:
    """A tiny Llama (4 query heads, 2 key heads, 2 layers).

    `static` units by layer, the others moved by the token.
    """
    static = static or {0: {2: "local", 3: "local"}, 1: {0: "full"}}
    model = tiny("llama").eval()
    router = patch(
        model,
        window=WINDOW,
        sinks=SINKS,
        experts=("full", "local"),
        route_by=route_by,
        controller_hidden=0,
    )
    generator = torch.Generator().manual_seed(1)
    for index, controller in enumerate(router.controller.layers):
        R = controller.num_units
        weight = torch.randn(R, 2, controller.out.in_features, generator=generator)
        bias = torch.zeros(R, 2)
        for unit, expert in static.get(index, {}).items():
            weight[unit] = 0
            bias[unit] = torch.tensor([9.0, -3.0] if expert == "full" else [-3.0, 9.0])
        controller.out.weight.data, controller.out.bias.data = weight.flatten(0, 1), bias.flatten()
    return model, router


def frozen(route_by: str = "head", **kwargs: Any) -> Any:
    model, router = moved(route_by, **kwargs)
    found = router.freeze(TEXT, share=0.0, context=40, limit=240)
    return model, router, found


def decoded(model: Any, ids: Tensor, chunks: list[int]) -> tuple[Tensor, Any]:
    """Logits of a text read in pieces behind a cache."""
    outs, cache = [], None
    with torch.no_grad():
        for part in ids.split(chunks, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits)
    return torch.cat(outs, 1), cache


def test_a_pass_makes_no_table_of_frozen_units_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, router, _ = frozen()
    with torch.inference_mode():
        before = model(TEXT[None, :40], use_cache=False).logits

    def refused(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a table was copied to the device")

    monkeypatch.setattr("bayes_router.transformer.frozen.torch.tensor", refused)
    out = model(
        TEXT[None, :40], use_cache=False
    ).logits  # with gradients, behind a pass that had none
    torch.testing.assert_close(out, before.clone())
    monkeypatch.undo()
    out.sum().backward()
    router.thaw()
    router.freeze(TEXT, share=0.49, context=40, limit=240)
    assert not torch.equal(model(TEXT[None, :40], use_cache=False).logits, out)


def test_a_table_made_in_inference_mode_serves_a_backward_pass() -> None:
    model, router, _ = frozen()
    router.frozen = Frozen(router.frozen.experts)
    hidden = torch.randn(1, 3, 32)
    with torch.inference_mode():
        router.posterior(0, hidden)
    router.posterior(0, hidden).concentration.square().sum().backward()
    moved = router.controller.layers[0].out.weight.grad.unflatten(0, (4, 2)).abs().sum((1, 2)) > 0
    assert moved.tolist() == [True, True, False, False]  # the units that choose


def test_freezing_finds_the_units_that_stand_still_and_says_what_they_cost() -> None:
    model, router, found = frozen()
    assert router.frozen.experts == ((-1, -1, 1, 1), (0, -1, -1, -1))
    assert (found.frozen, found.units, found.short, found.key_heads) == (3, 8, 1, 4)
    assert found.kept == WINDOW + SINKS - 1
    assert found.freed(70) == pytest.approx(0.25 * 0.9)
    assert found.lost == pytest.approx(0, abs=1e-6) and found.cost == pytest.approx(
        found.cost_before
    )
    assert "3 of 8 units" in str(found)
    router.thaw()
    assert router.freeze(TEXT, share=0.49, context=40, limit=240).frozen > 3


def test_a_share_freezes_what_moves_little_and_its_loss_is_read_elsewhere() -> None:
    """A unit that some tokens move is frozen on what most take.

    The loss and the cost change as a fixed route's do.
    """
    model, router = moved()
    ids = TEXT[None, :40]
    load = router(ids, "hard").route.float().mean((1, 2))  # of local
    share = float(torch.minimum(load, 1 - load).max()) + 0.05
    found = router.freeze(TEXT, share=min(share, 0.49), context=40, limit=240)
    assert found.cost != pytest.approx(found.cost_before, abs=1e-4) and found.lost != 0
    executed = router(ids, "hard").route
    for layer, units in enumerate(router.frozen.experts):
        for unit, expert in enumerate(units):
            assert expert == -1 or bool((executed[layer, :, :, unit] == expert).all())


def graded(route_by: str = "head") -> Any:
    """A patch whose key heads look far more and more, by bias; the first of layer 1 least."""
    model, router = moved(route_by, static={2: {}})  # none
    for index, controller in enumerate(router.controller.layers):
        R = controller.num_units
        for unit in range(R):
            key_head = unit * 2 // R
            apart = [[1.0, 0.3], [1.6, 0.7]][index][key_head] + 0.05 * (unit % 2)
            controller.out.bias.data.view(R, 2)[unit] = torch.tensor([-apart, apart])
    return model, router


@pytest.mark.parametrize("route_by", ["head", "kv_head"])
def test_to_free_memory_the_key_heads_that_look_far_least_are_frozen(route_by: str) -> None:
    _, router = graded(route_by)
    load = torch.stack(
        [
            router(ids[None], "hard").route.eq(0).double().mean((1, 2))
            for ids in TEXT[:120].view(3, 40)
        ]
    ).mean(0)  # [L, R] of full
    far = load.unflatten(1, (2, -1)).sum(-1).flatten()
    assert far.unique().numel() == 4  # or the order would not tell
    for heads in (1, 2, 3):
        free = (heads - 0.5) / 4 * (1 - 7 / 40)
        found = router.freeze(TEXT, free=free, context=40, limit=240)
        chosen = torch.tensor(router.frozen.experts).unflatten(1, (2, -1))
        taken = far.argsort()[:heads].tolist()
        where = [i for i, row in enumerate(chosen.flatten(0, 1)) if bool((row == 1).all())]
        assert sorted(taken) == where and router.frozen.number == heads * chosen.shape[-1]
        assert found.short == heads
        assert free < 1 - found.bytes / found.bytes_before == pytest.approx(found.freed(40))
        router.thaw()


def test_what_freed_heads_no_longer_spend_is_spent_elsewhere() -> None:
    """Under a price, and under no other policy; the loss of each window is the mean's."""
    model, router = graded()
    ratio = tuple(router.cost_ratio.tolist())
    first = TEXT[:120].view(3, 40)

    def cost() -> float:
        local = router(first, "hard").route.double().mean()
        return float(1 - local * (1 - router.cost_ratio[1]))

    router.policy = Budget(ratio, -0.5)
    before = cost()
    found = router.freeze(TEXT, free=0.4, context=40, limit=240)
    assert router.policy.price < -0.6 and router.policy.cost_ratio == ratio
    at_price, kept = router.policy, cost()
    router.policy = Budget(ratio, -0.5)
    assert abs(kept - before) < 0.01 < before - cost()
    assert found.lost == pytest.approx(float(torch.tensor(found.apart).mean().expm1()), abs=1e-7)
    assert len(found.apart) == 3
    router.thaw()
    router.policy = Argmax()
    plain = router.freeze(TEXT, free=0.4, context=40, limit=240)
    assert router.policy == Argmax() and plain.cost < plain.cost_before
    router.thaw()
    router.policy = at_price
    router.freeze(TEXT, share=0.3, context=40, limit=240)
    assert router.policy == at_price  # a share leaves the price


def test_what_cannot_be_freed_is_refused() -> None:
    _, router = graded()
    for given in (0.9, 0.0, 1.0, "half", float("nan")):
        with pytest.raises(ValueError, match="free: expected"):
            router.freeze(TEXT, free=given, context=40, limit=240)
    with pytest.raises(ValueError, match=r"free: .*40 tokens up to 0\.825"):
        router.freeze(TEXT, free=0.83, context=40, limit=240)
    with pytest.raises(ValueError, match="share: .*none beside free"):
        router.freeze(TEXT, free=0.4, share=0.1, context=40, limit=240)
    assert router.frozen is None
    router.unpatch()
    router = patch(tiny("llama"), window=WINDOW)  # with the linear expert every key is kept
    with pytest.raises(ValueError, match=r"free: .*up to 0\.000"):
        router.freeze(TEXT, free=0.1, context=40, limit=240)


@pytest.mark.parametrize("fails", ["before", "behind"])
def test_what_cannot_be_read_leaves_the_units_as_they_were(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first or the last thing that freezing reads of a cache fails."""
    _, router = moved()
    given = [1] if fails == "behind" else list[int]()

    def broken(_: object) -> int:
        if given:
            return given.pop()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(freezing, "cache_bytes", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        router.freeze(TEXT, share=0.3, context=40, limit=240)
    assert router.frozen is None


def test_the_controllers_of_frozen_units_are_not_run() -> None:
    """Numbers that no computation survives stand in their rows."""
    model, router, _ = frozen()
    ids = TEXT[None, :30]
    with torch.no_grad():
        before = model(ids).logits
    for controller, units in zip(router.controller.layers, router.frozen.experts, strict=True):
        for unit, expert in enumerate(units):
            if expert >= 0:
                controller.out.weight.data.view(4, 2, -1)[unit] = torch.nan
                controller.out.bias.data.view(4, 2)[unit] = torch.nan
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert all(sum(one.load) == pytest.approx(1) for one in router.statistics())
    router.policy = Budget(tuple(router.cost_ratio.tolist()), -1e3)  # every unit that chooses: full
    route = router(ids, "hard").route
    assert bool((route[0, ..., 2:] == 1).all()) and not bool(route[0, ..., :2].any())


@pytest.mark.parametrize("route_by", ["head", "kv_head", "layer"])
@pytest.mark.parametrize("chunks", [[40], [30, *[1] * 10], [20, 7, 1, 9, 3], [5, 2, *[1] * 33]])
def test_what_a_freed_cache_answers_is_the_whole_pass(route_by: str, chunks: list[int]) -> None:
    static = {
        "head": {0: {2: "local", 3: "local"}},
        "kv_head": {0: {1: "local"}},
        "layer": {1: {0: "local"}},
    }[route_by]
    model, router, found = frozen(route_by, static=static)
    assert found.short >= 1
    ids = TEXT[3:43].expand(2, -1).clone()
    ids[1] = ids[1].flip(0)
    whole, _ = decoded(model, ids, [40])
    parts, cache = decoded(model, ids, chunks)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    freed = [isinstance(layer, FreedLayer) for layer in cache.layers]
    assert freed == [bool(static.get(0)), bool(static.get(1))]
    assert cache.get_seq_length() == 40


def test_bytes_of_the_tensors_are_freed() -> None:
    model, router, found = frozen()
    ids = TEXT[None, :300]
    _, cache = decoded(model, ids[:, :250], [250])
    freed = cache_bytes(cache)
    router.thaw()
    _, whole = decoded(model, ids[:, :250], [250])
    dim, kept = 8, WINDOW + SINKS - 1
    # keys and values, layers, heads, tokens, float32
    assert cache_bytes(whole) == 2 * 2 * 2 * 250 * dim * 4
    assert freed == 2 * dim * 4 * (3 * 250 + kept)
    assert 1 - freed / cache_bytes(whole) == pytest.approx(found.freed(250))
    of_window = 2 * dim * 4  # a key head's key and value
    assert found.bytes_before == 4 * 40 * of_window
    assert found.bytes == (3 * 40 + kept) * of_window
    assert str(found).endswith("cache of 40 tokens: 10,240 -> 8,128 bytes")
    layer = cache.layers[0]
    assert layer.keys.shape == (1, 1, 250, dim) and layer.near[0].shape == (1, 1, kept, dim)


def test_generation_and_beams_behind_a_freed_cache() -> None:
    model, router, _ = frozen()
    prompt = TEXT[None, :30]
    for settings in ({}, {"num_beams": 3}):
        asked = {
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": 8,
            "pad_token_id": 0,
            "do_sample": False,
        }
        with torch.no_grad():
            cached = model.generate(prompt, **asked, **settings)
            plain = model.generate(prompt, use_cache=False, **asked, **settings)
        assert torch.equal(cached, plain)


def test_a_padded_batch_keeps_its_cache() -> None:
    model, router, _ = frozen()
    ids, mask = TEXT[None, :30].repeat(2, 1), torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    assert not any(isinstance(layer, FreedLayer) for layer in cache.layers)


def test_what_a_freed_cache_cannot_do_is_refused() -> None:
    model, router, _ = frozen()
    _, cache = decoded(model, TEXT[None, :30], [30])
    with pytest.raises(ValueError, match=r"past_key_values: .*thaw\(\)"):
        cache.layers[0].crop(20)
    cache.layers[0].crop(30)
    for change in (lambda: router.force("full"), router.thaw):
        change()
        with (
            pytest.raises(ValueError, match="past_key_values: .*read the text anew"),
            torch.no_grad(),
        ):
            model(TEXT[None, 30:31], past_key_values=cache)


def test_frozen_units_are_not_fitted_and_have_no_kl() -> None:
    model, router, _ = frozen()
    with torch.no_grad():
        model(TEXT[None, :20])
    with pytest.raises(ValueError, match=r"kl: .*3 frozen.*thaw\(\)"):
        router.kl()
    with pytest.raises(ValueError, match=r"fit: .*3 frozen.*thaw\(\)"):
        router.fit(TEXT, steps=1, progress=False)
    for share in (0.5, -0.1, "a tenth", float("nan")):
        with pytest.raises(ValueError, match="share"):
            router.freeze(TEXT, share=share, context=40)
    with pytest.raises(ValueError, match="texts: .*two windows"):
        router.freeze(TEXT[:41], context=40)
    assert router.frozen.number == 3


def test_what_is_frozen_is_saved(tmp_path: Path) -> None:
    model, router, _ = frozen()
    ids = TEXT[None, :40]
    with torch.no_grad():
        before = model(ids).logits
    router.save(tmp_path)
    router.unpatch()
    router = load_patch(model, tmp_path)
    assert router.frozen.experts == ((-1, -1, 1, 1), (0, -1, -1, -1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    router.unpatch()
    saved = json.loads((tmp_path / "router.json").read_text())
    for damaged in ([[0, 0]], [[-1, -1, 1, 2]] * 2, [[-1, -1, 1, "a"]] * 2, 3):
        (tmp_path / "router.json").write_text(json.dumps(saved | {"frozen": damaged}))
        with pytest.raises(ValueError, match="router.json: frozen: expected 2 lists of 4 experts"):
            load_patch(model, tmp_path)
    (tmp_path / "router.json").write_text(
        json.dumps({key: saved[key] for key in saved if key != "frozen"})
    )
    assert load_patch(model, tmp_path).frozen is None
