"""Prefill and decoding equal the full pass: every route mix, chunked, rows of different lengths; what a cache refuses."""

import pytest
import torch
from torch import Tensor

from bayes_router.attention.cache import LayerCache, RoutedCache
from bayes_router.attention.dispatch import routed_attention
from bayes_router.attention.expert import Expert, ExpertShape, expert_class
from tests.attention.expert_contract import draw
from tests.attention.test_dispatch import ROUTES, Squared, draw_route

WINDOW, B, H, HKV, T, DH = 9, 3, 4, 2, 60, 16
SHAPE = ExpertShape(H, DH, WINDOW)


class Averaged(Expert):
    """Neither rotary nor stateful: it needs the plain keys kept."""

    rotary = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        full = expert_class("full")(self.shape)
        return full(q * 0.5, k, v)

    def flops_per_token(self, context: int) -> float:
        return 1.0


def build(*names: str) -> tuple[Expert, ...]:
    custom = {"squared": Squared, "averaged": Averaged}
    return tuple((custom[n] if n in custom else expert_class(n))(SHAPE) for n in names)


def tensors() -> tuple[Tensor, ...]:
    q, k, v = draw(B, H, HKV, T, DH)
    return (q, k, v, *draw(B, H, HKV, T, DH, seed=1)[:2])


def feed(cache: LayerCache, inputs: tuple[Tensor, ...], route: Tensor, a: int, b: int) -> Tensor:
    q, k, v, lq, lk = (x[:, :, a:b] for x in inputs)
    return cache.attend(q, k, v, route[:, a:b], linear_q=lq, linear_k=lk)


MODELS = [("full", "linear", "local"), ("local",), ("linear", "local"), ("linear",), ("full", "squared", "averaged")]


@pytest.mark.parametrize("names", MODELS)
@pytest.mark.parametrize("cuts", [(), (25,), (1, 2, 30), tuple(range(1, T))])
@pytest.mark.parametrize("kind", ROUTES)
def test_prefill_and_decode_equal_the_full_pass(names: tuple[str, ...], cuts: tuple[int, ...], kind: str) -> None:
    experts, inputs = build(*names), tensors()
    route = draw_route(kind, B, T) % len(experts)
    q, k, v, lq, lk = inputs
    whole = routed_attention(q, k, v, route, window=WINDOW, linear_q=lq, linear_k=lk, backend="dense", experts=experts)
    cache = LayerCache(experts, B, T, HKV)
    edges = (0, *cuts, T)
    parts = [feed(cache, inputs, route, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [T] * B


@pytest.mark.parametrize("names", MODELS)
def test_rows_of_different_lengths(names: tuple[str, ...]) -> None:
    """Right-padded prompts, a right-padded second chunk, then steps: each row as if it were alone."""
    experts, inputs = build(*names), tensors()
    route = draw_route("independent", B, T) % len(experts)
    cache = LayerCache(experts, B, T, HKV)
    got: list[list[Tensor]] = [[] for _ in range(B)]
    at = torch.zeros(B, dtype=torch.int64)
    for sizes in ((20, 3, 11), (4, 13, 0), (1, 1, 1), (1, 1, 1), (2, 3, 1), (1, 1, 1)):
        n, lengths = max(sizes), torch.tensor(sizes)
        index = (at[:, None] + torch.arange(n)).clamp_max(T - 1)  # what stands past a row's length is arbitrary
        q, k, v, lq, lk = (torch.stack([x[b, :, index[b]] for b in range(B)]) for x in inputs)
        real = None if n == 1 and min(sizes) == 1 else lengths
        out = cache.attend(q, k, v, route.gather(1, index), linear_q=lq, linear_k=lk, lengths=real)
        for b, size in enumerate(sizes):
            got[b].append(out[b, :, :size])
            assert not out[b, :, size:].any()
        at += lengths
    assert cache.lengths.tolist() == at.tolist()
    for b, n in enumerate(at.tolist()):
        q, k, v, lq, lk = (x[b : b + 1, :, :n] for x in inputs)
        alone = routed_attention(
            q, k, v, route[b : b + 1, :n], window=WINDOW, linear_q=lq, linear_k=lk, experts=experts, backend="dense"
        )
        torch.testing.assert_close(torch.cat(got[b], 1), alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", MODELS)
def test_soft_weights_mix_every_expert(names: tuple[str, ...]) -> None:
    experts, inputs = build(*names), tensors()
    weights = torch.rand(B, T, len(experts)).softmax(-1)
    q, k, v, lq, lk = inputs
    want = sum(weights[:, None, :, i, None] * e(*((q, k) if e.rotary else (lq, lk)), v) for i, e in enumerate(experts))
    cache = LayerCache(experts, B, T, HKV)
    parts = [feed(cache, inputs, weights, a, b) for a, b in ((0, 30), (30, 58), (58, 59), (59, T))]
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=1e-5, atol=1e-5)


def test_a_window_only_model_keeps_a_ring() -> None:
    ring, whole = LayerCache(build("local"), B, 1000, HKV), LayerCache(build("full", "local"), B, 1000, HKV)
    assert ring.bytes == 2 * B * HKV * (WINDOW + 1) * DH * 4
    assert whole.bytes == 2 * B * HKV * 1001 * DH * 4
    linear = LayerCache(build("linear"), B, 1000, HKV)
    assert linear.bytes == B * HKV * DH * (DH + 1) * 4


def test_plain_keys_are_kept_only_for_who_needs_them() -> None:
    assert LayerCache(build("full", "linear"), B, 10, HKV).plain_keys is None
    assert LayerCache(build("full", "averaged"), B, 10, HKV).plain_keys is not None


def test_reorder_and_reset() -> None:
    experts, inputs = build("full", "linear", "local"), tensors()
    route = draw_route("rows differ", B, T)
    one, other = LayerCache(experts, B, T, HKV), LayerCache(experts, B, T, HKV)
    feed(one, inputs, route, 0, 20)
    index = torch.tensor([2, 0, 0])
    one.reorder(index)
    feed(other, tuple(x[index] for x in inputs), route[index], 0, 20)
    torch.testing.assert_close(feed(one, inputs, route, 20, 21), feed(other, inputs, route, 20, 21))
    one.reset()
    torch.testing.assert_close(feed(one, inputs, route, 0, 20), feed(LayerCache(experts, B, T, HKV), inputs, route, 0, 20))


def test_a_cache_that_is_too_small_says_how_large() -> None:
    cache, inputs, route = LayerCache(build("full"), B, 12, HKV), tensors(), torch.zeros(B, T, dtype=torch.int64)
    feed(cache, inputs, route, 0, 10)
    with pytest.raises(ValueError, match="capacity is 12 tokens, 15 are needed; build it with capacity=15"):
        feed(cache, inputs, route, 10, 15)
    assert cache.lengths.tolist() == [10] * B  # nothing was written
    feed(cache, inputs, route, 10, 12)


def test_padding_does_not_use_up_the_capacity() -> None:
    cache, (q, k, v, _, _) = LayerCache(build("full"), B, 12, HKV), (x[:, :, :10] for x in tensors())
    route = torch.zeros(B, 10, dtype=torch.int64)
    cache.attend(q, k, v, route, lengths=torch.tensor([4, 2, 1]))
    cache.attend(q, k, v, route, lengths=torch.tensor([8, 2, 0]))
    assert cache.lengths.tolist() == [12, 4, 1]


@pytest.mark.parametrize("change", ["batch", "heads", "key heads", "head_dim", "dtype"])
def test_a_cache_of_another_model_or_batch_is_refused(change: str) -> None:
    cache = LayerCache(build("full"), B, 12, HKV)
    sizes = {"batch": (B + 1, H, HKV, 4, DH), "heads": (B, 8, HKV, 4, DH), "key heads": (B, H, 4, 4, DH)}
    q, k, v = draw(*sizes.get(change, (B, H, HKV, 4, 32 if change == "head_dim" else DH)))
    if change == "dtype":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    with pytest.raises(ValueError, match="cache: built for .*build one for this model and batch"):
        cache.attend(q, k, v, torch.zeros(q.shape[0], 4, dtype=torch.int64))


def test_local_attention_with_sinks_is_refused() -> None:
    local = expert_class("local")(SHAPE._replace(sinks=4))
    with pytest.raises(ValueError, match="sinks: expected 0, .* got 4"):
        LayerCache((*build("full"), local), B, T, HKV)


def test_the_whole_cache_moves_on_when_its_last_layer_has() -> None:
    cache, inputs, route = RoutedCache.build([build("full"), build("local")], B, T, HKV), tensors(), draw_route("full", B, T)
    assert len(cache) == 2 and cache.capacity == T
    feed(cache[0], inputs, route, 0, 5)
    assert cache.lengths.tolist() == [0] * B
    feed(cache[1], inputs, route, 0, 5)
    assert cache.lengths.tolist() == [5] * B
    assert cache.bytes == cache[0].bytes + cache[1].bytes
    cache.reorder(torch.tensor([1, 0, 2]))
    cache.reset()
    assert cache.lengths.tolist() == [0] * B
