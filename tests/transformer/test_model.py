"""The routed Transformer: no future leak, forced routes, cached decoding, hard execution."""

import pytest
import torch
from torch import Tensor

from bayes_router.attention.decoding.model_cache import RoutedCache
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.network import RoutedTransformer
from bayes_router.types import RoutingMode
from tests.tiny import EXPERTS, tiny_batch, tiny_config, tiny_model

MODES = ("sample", "mean", "hard")


@torch.no_grad()
def run(model: RoutedLanguageModel, tokens: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(model(tokens, mode))  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["mean", "hard"])
@pytest.mark.parametrize("changed", [1, 20, 39])
def test_no_future_leak(mode: str, changed: int) -> None:
    """Changing token `changed` changes the later logits, concentrations and routes it should.

    It changes no earlier one.
    """
    model, (tokens, _) = tiny_model().double(), tiny_batch()
    other = tokens.clone()
    other[:, changed:] = (other[:, changed:] + 7) % 23
    before, after = run(model, tokens, mode), run(model, other, mode)
    logits, concentration, route = zip(before, after, strict=True)
    torch.testing.assert_close(logits[0][:, :changed], logits[1][:, :changed], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        concentration[0][:, :, :changed], concentration[1][:, :, :changed], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        route[0][:, :, :changed], route[1][:, :, :changed], rtol=1e-9, atol=1e-9
    )
    assert not torch.allclose(logits[0][:, changed:], logits[1][:, changed:])


@pytest.mark.parametrize("expert", EXPERTS)
def test_no_future_leak_through_any_expert(expert: str) -> None:
    model, (tokens, _) = tiny_model().double(), tiny_batch(T=130)
    other = tokens.clone()
    other[:, 70:] = (other[:, 70:] + 7) % 23
    with torch.no_grad():
        a, b = (model(x, force=expert).logits for x in (tokens, other))
    torch.testing.assert_close(a[:, :70], b[:, :70], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(a[:, 70:], b[:, 70:])


def test_a_draw_leaks_nothing_either() -> None:
    """SAMPLE: with the noise of a token fixed, earlier outputs do not move.

    The gradient says it: d logit_t / d embed_s = 0.
    """
    model, (tokens, _) = tiny_model(), tiny_batch(B=1, T=12)
    embedded = model.network.embed(tokens).detach().requires_grad_()
    model.network.embed.forward = lambda _: embedded  # type: ignore[method-assign]
    logits = model(tokens, "sample").logits
    for t in (0, 5, 10):
        (slope,) = torch.autograd.grad(logits[0, t].sum(), embedded, retain_graph=True)
        assert float(slope[0, t + 1 :].abs().max()) == 0.0
        assert float(slope[0, t].abs().max()) > 0


def test_nothing_depends_on_the_length() -> None:
    """A prefix routes and predicts the same whatever is appended."""
    model, (tokens, _) = tiny_model(), tiny_batch(T=64)
    whole, part = run(model, tokens, "hard"), run(model, tokens[:, :30], "hard")
    torch.testing.assert_close(whole[0][:, :30], part[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(whole[2][:, :, :30], part[2])


@pytest.mark.parametrize("expert", EXPERTS)
def test_forcing_an_expert_by_name_choice_or_weight_is_the_same(expert: str) -> None:
    model, (tokens, _) = tiny_model(), tiny_batch()
    index = EXPERTS.index(expert)
    choices = torch.full((3, 2, 40), index)
    weights = torch.nn.functional.one_hot(choices, 4).float()
    with torch.no_grad():
        by_name, by_choice, by_weight = (
            model(tokens, force=f).logits for f in (expert, choices, weights)
        )
    torch.testing.assert_close(by_name, by_choice, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_name, by_weight, rtol=1e-4, atol=1e-4)


def test_hard_is_the_one_hot_mixture_of_the_argmax() -> None:
    model, (tokens, _) = tiny_model(), tiny_batch()
    hard = model(tokens, RoutingMode.HARD)
    assert len(hard.route.unique()) == 4, "the routes of the test should use every expert"
    assert torch.equal(hard.route, hard.concentration.argmax(-1))
    soft = model(tokens, force=torch.nn.functional.one_hot(hard.route, 4).float())
    torch.testing.assert_close(hard.logits, soft.logits, rtol=1e-4, atol=1e-4)


def test_mean_weighs_by_the_posterior_mean() -> None:
    model, (tokens, _) = tiny_model(), tiny_batch()
    out = model(tokens, "mean")
    torch.testing.assert_close(
        out.route, out.concentration / out.concentration.sum(-1, keepdim=True)
    )


@pytest.mark.parametrize("mode", ["mean", "hard"])
@pytest.mark.parametrize("parts", [[40], [1] * 40, [25, 1, 1, 13], [7, 33]])
def test_cached_decoding_equals_the_full_pass(mode: str, parts: list[int]) -> None:
    model, (tokens, _) = tiny_model(), tiny_batch()
    full = run(model, tokens, mode)
    cache = model.network.new_cache(2, 40)
    logits, routes, start = [], [], 0
    with torch.no_grad():
        for length in parts:
            out = model(tokens[:, start : start + length], mode, cache=cache)
            logits.append(out.logits)
            routes.append(out.route)
            start += length
    torch.testing.assert_close(torch.cat(logits, 1), full[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(routes, 2), full[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["mean", "hard", *EXPERTS])
@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_different_lengths_are_each_as_if_alone(mode: str, cached: bool) -> None:
    """Two right-padded chunks and a step.

    Positions, routes and the last logits are each row's own.
    """
    model, (tokens, _) = tiny_model(), tiny_batch(B=3)
    named = {"force": mode} if mode in EXPERTS else {"mode": mode}
    cache, start = (
        model.network.new_cache(3, 40) if cached else None,
        torch.zeros(3, dtype=torch.int64),
    )
    for sizes in ((20, 3, 11), (4, 13, 1), (1, 1, 1)):
        lengths = torch.tensor(sizes)
        index = (start[:, None] + torch.arange(max(sizes))).clamp_max(39)
        real = None if max(sizes) == 1 else lengths
        with torch.no_grad():
            part = tokens.gather(1, index)
            last = None if cached else model(part, lengths=real, last_only=True, **named).logits
            out = model(part, cache=cache, lengths=real, **named)
            for b, size in enumerate(sizes):
                first = int(start[b]) if cached else 0
                begin = 0 if cached else int(start[b])
                alone = model(tokens[b : b + 1, begin : int(start[b]) + size], **named)
                torch.testing.assert_close(
                    out.logits[b, :size], alone.logits[0, first:], rtol=1e-4, atol=1e-4
                )
                torch.testing.assert_close(
                    out.route[:, b, :size], alone.route[:, 0, first:], rtol=1e-4, atol=1e-4
                )
                if last is not None:
                    torch.testing.assert_close(
                        last[b, 0], alone.logits[0, -1], rtol=1e-4, atol=1e-4
                    )
        start += lengths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        (
            {"seed": 1},
            (
                r"cache\[0\].experts: expected this layer's own experts, .* another layer or "
                r"model, "
                r".* new_cache"
            ),
        ),
        (
            {"experts": ("full", "gated", "local", "linear")},
            r"cache\[0\].experts: expected .*\(full .*\(full ",
        ),
        ({"window": 6}, r"cache\[0\].experts: expected .* 4, 5, 0\).* 4, 6, 0\)"),
        (
            {"num_layers": 2},
            "cache: expected 3 layers; got 2; build it with new_cache of this model",
        ),
        ({"num_layers": 4}, "cache: expected 3 layers; got 4"),
    ],
)
def test_a_cache_of_another_model_is_refused(
    change: dict[str, object], message: str | None
) -> None:
    """Of the same sizes too: what its states mean depends on the weights of its experts.

    Nothing is written.
    """
    model, (tokens, _) = tiny_model(), tiny_batch()
    cache = (tiny_model(**change) if change else model).network.new_cache(2, 40)  # type: ignore[arg-type]
    if message is None:
        model(tokens, cache=cache)
        return
    with pytest.raises(ValueError, match=message):
        model(tokens, cache=cache)
    assert cache.lengths.tolist() == [0, 0] and not any(
        state.any() for state in cache[0].states.values()
    )


def test_layers_of_a_cache_in_another_order_are_refused() -> None:
    model = tiny_model()
    layers = model.network.new_cache(2, 40).layers
    with pytest.raises(ValueError, match=r"cache\[0\].experts: expected this layer's own"):
        model(tiny_batch()[0], cache=RoutedCache(layers[::-1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": 5}, "cache: expected a RoutedCache; got 'int'"),
        ({"lengths": torch.tensor([41, 1])}, "lengths: expected values in 0..40"),
        ({"lengths": torch.tensor([-1, 1])}, "lengths: expected values in 0..40"),
        (
            {"lengths": torch.tensor([1.0, 1.0])},
            "lengths: expected int64 or int32 of shape .2,. on cpu; got torch.float32",
        ),
        ({"lengths": [1, 1]}, "lengths: expected int64 or int32 .* got 'list'"),
    ],
)
def test_bad_lengths_and_caches_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(tiny_batch()[0], **arguments)


def test_a_cache_of_another_batch_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="cache: expected the batch of tokens, 2 rows; got 3"):
        model(tiny_batch()[0], cache=model.network.new_cache(3, 40))


def test_a_route_of_any_callable_is_enough() -> None:
    """The transformer knows no posterior: a constant will do."""
    network, (tokens, _) = RoutedTransformer(tiny_config()), tiny_batch()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(2, 40, 4)
    seen: list[int] = []

    def route(layer: int, hidden: Tensor) -> Tensor:
        seen.append(layer)
        assert hidden.shape == (2, 40, 16)
        return weights

    assert network(tokens, route).shape == (2, 40, 23)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((1, 4), 23), "tokens: expected ids from 0 to 22"),
        (torch.full((1, 4), -1), "tokens: expected ids from 0 to 22"),
        (torch.zeros(4, dtype=torch.int64), "tokens: expected shape"),
        (torch.zeros(1, 4), "tokens: expected torch.int64"),
        ([[1, 2]], r"tokens: expected a tensor, int64 \[B, T\]; got 'list'"),
        (
            torch.zeros(1, 4, dtype=torch.int64, device="meta"),
            "tokens: expected the device of the model, cpu; got meta; move",
        ),
    ],
)
def test_bad_tokens_are_refused(tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens)


@pytest.mark.parametrize(
    "force",
    [
        "ful",
        5,
        torch.zeros(2, 2, 40, dtype=torch.int64),
        torch.zeros(3, 2, 39, dtype=torch.int64),
        torch.full((3, 2, 40), 4),
        torch.full((3, 2, 40), -1),
        torch.zeros(3, 2, 40, 2, dtype=torch.int64),
        torch.zeros(3, 2, 40, dtype=torch.bool),
        torch.zeros(3, 2, 40),
        torch.zeros(3, 2, 40, 1, 3),
    ],
)
def test_bad_forces_are_refused(force: str | Tensor) -> None:
    with pytest.raises(ValueError, match="^force: expected"):
        tiny_model()(tiny_batch()[0], force=force)


def test_an_unknown_mode_lists_the_modes() -> None:
    with pytest.raises(ValueError, match="mode: expected one of hard, mean, sample; got 'soft'"):
        tiny_model()(tiny_batch()[0], "soft")


def test_one_token_and_window_beyond_the_text() -> None:
    model = tiny_model(window=500)
    tokens = tiny_batch()[0]
    assert model(tokens[:, :1], "hard").logits.shape == (2, 1, 23)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, force="local").logits,
            model(tokens, force="full").logits,
            rtol=1e-4,
            atol=1e-4,
        )
