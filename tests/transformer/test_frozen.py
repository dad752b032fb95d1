"""Units that nobody moves, in a model trained from scratch: same outputs, and keys really gone."""

from pathlib import Path

import pytest
import torch

from bayes_router.attention.decoding.freed import FreedCache
from bayes_router.routing.policy import Budget
from bayes_router.transformer.frozen import LIVE, Frozen
from bayes_router.transformer.generate import Sampling, generate
from bayes_router.transformer.model import RoutedLanguageModel
from tests.tiny import EXPERTS, tiny_batch, tiny_model

T, WINDOW = 40, 5
SIZES = {"num_heads": 8, "num_kv_heads": 4, "d_model": 32}


def table(model: RoutedLanguageModel, expert: str, heads: tuple[int, ...]) -> Frozen:
    """Units of these key heads on one expert in layers 0 and 2; one unit on full in layer 1."""
    config = model.config
    at, R = config.experts.index(expert), config.num_units
    rows = [[LIVE] * R for _ in range(config.num_layers)]
    for layer in (0, 2):
        for unit in range(R):
            size = max(R // config.kv_heads, 1)
            mine = range(unit * config.kv_heads // R, (unit + 1) * config.kv_heads // R)
            if R == 1 or set(mine or [unit // size]) <= set(heads):
                rows[layer][unit] = at
    rows[1][0] = config.experts.index("full")
    return Frozen(tuple(map(tuple, rows)))


def frozen_model(route_by: str, experts: tuple[str, ...], expert: str) -> RoutedLanguageModel:
    model = tiny_model(route_by=route_by, experts=experts, **SIZES).eval()
    model.frozen = table(model, expert, (0, 2, 3))
    return model


@pytest.mark.parametrize("route_by", ["layer", "kv_head", "head"])
@pytest.mark.parametrize(
    ("experts", "expert"),
    [(("full", "local"), "local"), (EXPERTS, "local"), (("full", "gated"), "gated")],
)
@torch.no_grad()
def test_behind_a_freed_cache_tokens_get_what_a_full_pass_gives(
    route_by: str, experts: tuple[str, ...], expert: str
) -> None:
    """In one chunk, in several, a token at a time, and with rows of unequal lengths."""
    model = frozen_model(route_by, experts, expert)
    tokens, _ = tiny_batch(2, T)
    whole = model(tokens)
    for layer in (0, 2):
        where = torch.tensor(model.frozen.experts[layer]) != LIVE
        assert bool((whole.route[layer][..., where] == experts.index(expert)).all())
    for chunks in ([T], [17, 3, 8, 12], [12, *[1] * (T - 12)]):
        cache, got = model.new_cache(2, T), []
        for part in tokens.split(chunks, 1):
            got.append(model(part, cache=cache).logits)
        assert sum(isinstance(layer, FreedCache) for layer in cache.layers) == 2
        torch.testing.assert_close(torch.cat(got, 1), whole.logits, rtol=1e-4, atol=2e-5)
    cache, lengths = model.new_cache(2, T + 4), torch.tensor([9, 14])
    model(tokens[:, :14], cache=cache, lengths=lengths)
    rows = torch.arange(2)
    for step in range(12):
        got_one = model(tokens[rows, lengths + step][:, None], cache=cache).logits[:, 0]
        expected = whole.logits[rows, lengths + step]
        torch.testing.assert_close(got_one, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("route_by", ["layer", "kv_head", "head"])
def test_the_bytes_of_keys_that_nobody_reads_are_gone(route_by: str) -> None:
    model = frozen_model(route_by, ("full", "local"), "local")
    cache, full = model.new_cache(2, T), model.network.new_cache(2, T)
    short = 4 if route_by == "layer" else 3
    of_token = 2 * 2 * 4 * (model.config.d_model // 8)  # keys and values, rows, bytes, width
    assert full.bytes == 3 * 4 * (T + 1) * of_token
    assert full.bytes - cache.bytes == 2 * short * (T - WINDOW) * of_token
    held = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.held())
    assert held == cache.bytes  # no hidden copy of what was dropped


def test_freezing_is_read_from_a_text_and_generation_takes_the_freed_cache(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A unit is frozen if all but a share of the first half's tokens take one expert."""
    model = tiny_model(route_by="head", experts=("full", "local"), **SIZES).train()
    local = model.config.experts.index("local")
    with torch.no_grad():
        for controller in model.controller.layers:
            controller.out.bias.view(8, 2)[:4, local] += 60.0  # key heads 0 and 1 are settled
    tokens = torch.randint(23, (400,), generator=torch.Generator().manual_seed(3))
    found = model.freeze(tokens, share=0.0, context=T)
    assert model.training and found.short == 6 and found.key_heads == 12
    assert found.lost == 0 and found.cost == found.cost_before and found.frozen >= 12
    print(found)
    assert "6 of 12 key heads keep 5 keys" in capsys.readouterr().out
    prompt, greedy = tokens[None, :T], Sampling(temperature=0)
    seen = []
    model.controller.layers[0].register_forward_hook(lambda m, x, out: seen.append(out.shape[2]))
    new, _ = generate(model, prompt, 8, greedy)
    assert set(seen) == {8 - sum(e != LIVE for e in model.frozen.experts[0])} != {8}
    frozen, model.frozen = model.frozen, None
    assert torch.equal(generate(model, prompt, 8, greedy)[0], new)
    some = model.freeze(tokens, share=0.4, context=T)
    assert some.frozen > frozen.number and some.lost != 0


@pytest.mark.parametrize("experts", [("full", "local"), EXPERTS])
def test_the_heads_that_look_far_least_free_what_was_asked(experts: tuple[str, ...]) -> None:
    """Each of their units on the expert near by that it takes most; the policy stays."""
    model = tiny_model(route_by="head", experts=experts, **SIZES).eval()
    full = experts.index("full")
    with torch.no_grad():
        for layer, controller in enumerate(model.controller.layers):
            bias = controller.out.bias.view(8, len(experts))
            bias[:, full] += torch.tensor([3.0, 2.0, -1.0, 4.0])[:, None].expand(4, 2).flatten()
            bias[4:6, full] -= layer
    tokens = torch.randint(23, (400,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        route = torch.cat([model(ids[None]).route for ids in tokens[: 4 * T].view(4, T)], 1)
    load = torch.nn.functional.one_hot(route, len(experts)).double().mean((1, 2))  # [L, R, E]
    found = model.freeze(tokens, free=0.2, context=T, limit=8 * T)
    far = load[..., full].view(3, 4, 2).sum(-1).flatten()
    taken = set(far.argsort()[: found.short].tolist())
    assert found.short == 3 and far.sort().values[2] < far.sort().values[3]
    near = [i for i in range(len(experts)) if i != full]
    for layer, row in enumerate(model.frozen.experts):
        for unit, expert in enumerate(row):
            mine = near[int(load[layer, unit, near].argmax())]
            assert expert == (mine if layer * 4 + unit // 2 in taken else LIVE)
    assert 0.2 <= found.freed(T) < 0.3 and found.bytes < found.bytes_before
    with pytest.raises(ValueError, match="free"):
        model.freeze(tokens, free=0.95, context=T, limit=8 * T)


def test_a_cache_that_was_freed_refuses_what_would_read_its_keys() -> None:
    model = frozen_model("head", ("full", "local"), "local")
    tokens, _ = tiny_batch(1, T)
    cache = model.new_cache(1, T)
    model(tokens[:, :20], cache=cache)
    with pytest.raises(ValueError, match=r"cache.*frozen now.*new_cache of this model"):
        model(tokens[:, 20:21], cache=cache, force="full")
    with pytest.raises(ValueError, match="route.*choices.*weights"):
        model(tokens[:, 20:21], mode="mean", cache=cache)
    model.frozen = None
    with pytest.raises(ValueError, match="frozen now"):
        for step in range(20, T):
            model(tokens[:, step : step + 1], cache=cache)
    with pytest.raises(ValueError, match="short.*key heads of 0..3"):
        model.network.new_cache(1, T, [[4], [], []])
    with pytest.raises(ValueError, match="texts.*two windows"):
        model.freeze(tokens[0], context=T - 1)
    for given, field in (
        ({"tokens": [1, 2, 3]}, "tokens"),
        ({"limit": 0}, "limit"),
        ({"context": 0}, "context"),
    ):
        with pytest.raises(ValueError, match=f"^{field}: expected"):
            model.freeze(**{"tokens": tokens[0].repeat(9), "context": 5, **given})


def test_no_policy_moves_a_frozen_unit() -> None:
    model = frozen_model("head", ("full", "local"), "local")
    tokens, _ = tiny_batch(1, T)
    for price, expert in ((1000.0, "full"), (-1000.0, "local")):
        model.policy = Budget((1.0, 0.1), price)
        static = torch.tensor(model.frozen.experts)
        where = static == model.config.experts.index(expert)
        routes = model(tokens).route.movedim(-1, 1).flatten(2)  # [L, R, T]
        assert bool(where.any()) and torch.equal(
            routes[where], static[where][:, None].expand_as(routes[where])
        )
        assert not bool((routes[static == LIVE] == model.config.experts.index(expert)).any())


def test_frozen_units_are_saved(tmp_path: Path) -> None:
    model = frozen_model("head", ("full", "local"), "local")
    model.save_pretrained(tmp_path)
    again = RoutedLanguageModel.from_pretrained(tmp_path)
    assert again.frozen == model.frozen
    tokens, _ = tiny_batch(1, T)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_freed_cache_is_reordered_and_reset() -> None:
    model = frozen_model("kv_head", ("full", "local"), "local")
    tokens, _ = tiny_batch(2, T)
    cache = model.new_cache(2, T)
    model(tokens[:, :20], cache=cache)
    cache.reorder(torch.tensor([1, 1]))
    got = model(tokens[[1, 1], 20:21], cache=cache).logits[:, 0]
    expected = model(tokens[[1, 1], :21]).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    cache.reset()
    again = model(tokens[:, :20], cache=cache).logits
    torch.testing.assert_close(again, model(tokens[:, :20]).logits, rtol=1e-4, atol=2e-5)
