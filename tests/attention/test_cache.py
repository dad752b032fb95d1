"""Prefill and decoding equal the full pass: every route mix, chunked, rows of different lengths.

What a cache refuses.
"""

import copy

import pytest
import torch
from torch import Tensor

from bayes_router.attention.decoding import cache as cache_module
from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.decoding.model_cache import RoutedCache
from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.kernels.eager.chunks import with_ones
from bayes_router.attention.shapes import ExpertShape, repeat_heads
from tests.attention.decode_check import DECODERS, Decoder, needed_only, steps_equal_the_full_pass
from tests.attention.dense_check import draw_expert
from tests.attention.expert_contract import draw, relative_error
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


class Running(Expert):
    """Stateful, of the user's: the mean of all values so far."""

    name = "running"
    stateful = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[2] == k.shape[2]
        return self.extend(q, k, v, self.init_state(q, k, v))[0]

    def init_state(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros(*q.shape[:2], v.shape[3] + 1, device=v.device)

    def extend_segment(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        value = with_ones(repeat_heads(v, q.shape[1]))
        summed = state[:, :, None] + value.cumsum(2)
        return summed[..., :-1] / summed[..., -1:], summed[:, :, -1]

    def flops_per_token(self, context: int) -> float:
        return 1.0


def build(*names: str, shape: ExpertShape = SHAPE) -> tuple[Expert, ...]:
    """Built-in experts with parameters away from where they start."""
    custom = {"squared": Squared, "averaged": Averaged, "running": Running}
    return tuple(custom[n](shape) if n in custom else draw_expert(n, shape) for n in names)


def tensors() -> tuple[Tensor, ...]:
    q, k, v = draw(B, H, HKV, T, DH)
    return (q, k, v, *draw(B, H, HKV, T, DH, seed=1)[:2])


def feed(cache: LayerCache, inputs: tuple[Tensor, ...], route: Tensor, a: int, b: int) -> Tensor:
    q, k, v, lq, lk = (x[:, :, a:b] for x in inputs)
    return cache.attend(q, k, v, route[:, a:b], linear_q=lq, linear_k=lk)


MODELS = [
    ("full", "linear", "local"),
    ("full", "gated", "local"),
    ("local",),
    ("linear", "local"),
    ("gated", "local"),
    ("full", "mapped", "local"),
    ("linear",),
    ("gated", "linear"),
    ("full", "squared", "averaged"),
    ("running", "full", "gated"),
]


@pytest.mark.parametrize("names", MODELS)
@pytest.mark.parametrize("cuts", [(), (25,), (1, 2, 30), tuple(range(1, T))])
@pytest.mark.parametrize("kind", ROUTES)
def test_prefill_and_decode_equal_the_full_pass(
    names: tuple[str, ...], cuts: tuple[int, ...], kind: str
) -> None:
    experts, inputs = build(*names), tensors()
    route = draw_route(kind, B, T) % len(experts)
    q, k, v, lq, lk = inputs
    whole = routed_attention(
        q, k, v, route, window=WINDOW, linear_q=lq, linear_k=lk, backend="dense", experts=experts
    )
    cache = LayerCache(experts, B, T, HKV)
    edges = (0, *cuts, T)
    parts = [feed(cache, inputs, route, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [T] * B


@pytest.mark.parametrize("names", MODELS)
def test_rows_of_different_lengths(names: tuple[str, ...]) -> None:
    """Right-padded prompts, a right-padded second chunk, then steps.

    Each row as if it were alone, whatever the padding.
    """
    experts, inputs = build(*names), tensors()
    route = draw_route("independent", B, T) % len(experts)
    cache = LayerCache(experts, B, T, HKV)
    got: list[list[Tensor]] = [[] for _ in range(B)]
    at = torch.zeros(B, dtype=torch.int64)
    for sizes in ((20, 3, 11), (4, 13, 0), (1, 1, 1), (1, 1, 1), (2, 3, 1), (1, 1, 1)):
        n, lengths = max(sizes), torch.tensor(sizes)
        index = (at[:, None] + torch.arange(n)).clamp_max(T - 1)
        padding = (torch.arange(n) >= lengths[:, None])[:, None, :, None]
        rows = (torch.stack([x[b, :, index[b]] for b in range(B)]) for x in inputs)
        q, k, v, lq, lk = (x.masked_fill(padding, 1e4) for x in rows)
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
            q,
            k,
            v,
            route[b : b + 1, :n],
            window=WINDOW,
            linear_q=lq,
            linear_k=lk,
            experts=experts,
            backend="dense",
        )
        torch.testing.assert_close(torch.cat(got[b], 1), alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", MODELS)
def test_soft_weights_mix_every_expert(names: tuple[str, ...]) -> None:
    experts, inputs = build(*names), tensors()
    weights = torch.rand(B, T, len(experts)).softmax(-1)
    q, k, v, lq, lk = inputs
    want = sum(
        weights[:, None, :, i, None] * e(*((q, k) if e.rotary else (lq, lk)), v)
        for i, e in enumerate(experts)
    )
    cache = LayerCache(experts, B, T, HKV)
    parts = [feed(cache, inputs, weights, a, b) for a, b in ((0, 30), (30, 58), (58, 59), (59, T))]
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names", [("full", "gated", "local"), ("gated", "linear", "local"), ("local",)]
)
def test_long_text_chunked_and_then_steps_equal_the_full_pass(names: tuple[str, ...]) -> None:
    """2000 tokens in three chunks, then 50 one at a time."""
    length, steps, window = 2000, 50, 64
    total = length + steps
    experts = build(*names, shape=ExpertShape(H, DH, window))
    inputs = (*draw(B, H, HKV, total, DH), *draw(B, H, HKV, total, DH, seed=1)[:2])
    route = draw_route("independent", B, total) % len(names)
    q, k, v, lq, lk = (x.double() for x in inputs)
    exact = [copy.deepcopy(expert).double() for expert in experts]
    want = torch.zeros_like(q)
    for index, expert in enumerate(exact):
        with torch.no_grad():
            rows = expert(*((q, k) if expert.rotary else (lq, lk)), v)
        want = torch.where((route == index)[:, None, :, None], rows, want)
    cache = LayerCache(experts, B, total, HKV)
    edges = (0, 700, 1900, *range(length, total + 1))
    parts = [feed(cache, inputs, route, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    assert relative_error(torch.cat(parts, 2), want) < 1e-5
    assert relative_error(torch.cat(parts[3:], 2), want[:, :, length:]) < 1e-5


@pytest.mark.parametrize("names", DECODERS)
@pytest.mark.parametrize("capacity", [40, 34])
def test_steps_of_rows_of_different_lengths(names: tuple[str, ...], capacity: int) -> None:
    """Rows take another expert at every step."""
    decoder = Decoder(names, B=4, H=H, Hkv=HKV, Dh=DH, window=WINDOW, capacity=capacity)
    steps_equal_the_full_pass(decoder, prompts=(30, 7, 1, 0), steps=4, tolerance=1e-5)


@pytest.mark.parametrize("names", [*DECODERS, ("local",), ("gated", "local")])
@pytest.mark.parametrize("prompts", [(30, 20, 3), (20, 20, 20)])
def test_what_no_row_needs_is_not_read(names: tuple[str, ...], prompts: tuple[int, ...]) -> None:
    needed_only(
        Decoder(names, B=3, H=H, Hkv=HKV, Dh=DH, window=WINDOW, capacity=40),
        prompts,
        tolerance=1e-5,
    )


def test_a_ring_of_several_windows_reads_each_row_its_own() -> None:
    experts = tuple(draw_expert("local", SHAPE._replace(window=window)) for window in (4, 9, 6))
    decoder = Decoder(("local",), B=3, H=H, Hkv=HKV, Dh=DH, window=1, capacity=100)
    decoder.experts = experts
    assert decoder.cache().ring
    steps_equal_the_full_pass(decoder, prompts=(13, 2, 0), steps=12, tolerance=1e-5)
    needed_only(decoder, prompts=(13, 2, 30), tolerance=1e-5)


@pytest.mark.parametrize("backend", ["torch", "dense", "reference"])
@pytest.mark.parametrize("names", MODELS)
def test_a_named_backend_computes_steps_too(
    names: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "attend_one", None)  # a name is obeyed
    experts, inputs, route = build(*names), tensors(), draw_route("independent", B, T) % len(names)
    q, k, v, lq, lk = inputs
    whole = routed_attention(
        q, k, v, route, window=WINDOW, linear_q=lq, linear_k=lk, backend="dense", experts=experts
    )
    cache, parts = LayerCache(experts, B, T, HKV), []
    for a, b in ((0, 30), (30, 31), (31, 32)):
        q, k, v, lq, lk = (x[:, :, a:b] for x in inputs)
        parts.append(
            cache.attend(q, k, v, route[:, a:b], linear_q=lq, linear_k=lk, backend=backend)
        )
    torch.testing.assert_close(torch.cat(parts, 2), whole[:, :, :32], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "short"])
@pytest.mark.parametrize("held", [0, 5])
@pytest.mark.parametrize("names", MODELS)
def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(
    names: tuple[str, ...], backend: str, held: int
) -> None:
    cache, inputs, route = (
        LayerCache(build(*names), B, T, HKV),
        tensors(),
        torch.zeros(B, T, dtype=torch.int64),
    )
    feed(cache, inputs, route, 0, held)
    before = copy.deepcopy((cache.lengths, cache.longest, cache.keys, cache.values, cache.states))
    q, k, v, *_ = (x[:, :, held : held + 1] for x in inputs)
    with pytest.raises(RuntimeError) as found:
        cache.attend(q, k, v, route[:, :1], backend=backend)
    with pytest.raises(RuntimeError) as known:
        routed_attention(q, k, v, route[:, :1], window=WINDOW, backend=backend)
    assert str(found.value) == str(known.value)
    torch.testing.assert_close(
        (cache.lengths, cache.longest, cache.keys, cache.values, cache.states),
        before,
        rtol=0,
        atol=0,
    )


def test_an_int_is_a_route() -> None:
    inputs, route = tensors(), torch.full((B, T), 1)
    for a, b in ((0, 20), (0, 1)):
        caches = [LayerCache(build("full", "local"), B, T, HKV) for _ in range(2)]
        for start in (0, b):
            q, k, v, *_ = (x[:, :, start + a : start + b] for x in inputs)
            torch.testing.assert_close(
                caches[0].attend(q, k, v, 1), caches[1].attend(q, k, v, route[:, : b - a])
            )


def test_a_step_keeps_its_states_where_they_are() -> None:
    """So that a CUDA graph may replay it."""
    cache, inputs = LayerCache(build("running", "linear", "gated"), B, T, HKV), tensors()
    held = dict(cache.states)
    for a, b in ((0, 20), (20, 21)):
        feed(cache, inputs, draw_route("rows differ", B, T), a, b)
    assert all(cache.states[index] is state and state.any() for index, state in held.items())


def test_a_window_only_model_keeps_a_ring() -> None:
    ring, whole = (
        LayerCache(build("local"), B, 1000, HKV),
        LayerCache(build("full", "local"), B, 1000, HKV),
    )
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
    torch.testing.assert_close(
        feed(one, inputs, route, 0, 20), feed(LayerCache(experts, B, T, HKV), inputs, route, 0, 20)
    )
    one.reset()
    fresh = LayerCache(experts, B, T, HKV)
    for t in range(3):  # tokens one by one add to the states that are there
        torch.testing.assert_close(
            feed(one, inputs, route, t, t + 1), feed(fresh, inputs, route, t, t + 1)
        )


def test_a_cache_that_is_too_small_says_how_large() -> None:
    cache, inputs, route = (
        LayerCache(build("full"), B, 12, HKV),
        tensors(),
        torch.zeros(B, T, dtype=torch.int64),
    )
    feed(cache, inputs, route, 0, 10)
    with pytest.raises(
        ValueError, match="capacity is 12 tokens, 15 are needed; build it with capacity=15"
    ):
        feed(cache, inputs, route, 10, 15)
    assert cache.lengths.tolist() == [10] * B  # nothing was written
    feed(cache, inputs, route, 10, 12)


def test_padding_does_not_use_up_the_capacity() -> None:
    cache, (q, k, v, _, _) = (
        LayerCache(build("full"), B, 12, HKV),
        (x[:, :, :10] for x in tensors()),
    )
    route = torch.zeros(B, 10, dtype=torch.int64)
    cache.attend(q, k, v, route, lengths=torch.tensor([4, 2, 1]))
    cache.attend(q, k, v, route, lengths=torch.tensor([8, 2, 0]))
    assert cache.lengths.tolist() == [12, 4, 1]


@pytest.mark.parametrize("names", MODELS)
def test_prompts_padded_beyond_the_capacity(names: tuple[str, ...]) -> None:
    experts, (q, k, v, lq, lk) = build(*names), tensors()
    route, lengths = draw_route("independent", B, T) % len(names), torch.tensor([12, 2, 0])
    cache = LayerCache(experts, B, 12, HKV)
    out = cache.attend(q, k, v, route, linear_q=lq, linear_k=lk, lengths=lengths)
    whole = routed_attention(
        q, k, v, route, window=WINDOW, linear_q=lq, linear_k=lk, experts=experts, lengths=lengths
    )
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    one = cache.attend(
        *(x[:, :, :1] for x in (q, k, v)), route[:, :1], lengths=torch.tensor([0, 1, 1])
    )
    assert cache.lengths.tolist() == [12, 3, 1] and not one[0].any()


@pytest.mark.parametrize("change", ["batch", "heads", "key heads", "head_dim", "dtype"])
def test_a_cache_of_another_model_or_batch_is_refused(change: str) -> None:
    cache = LayerCache(build("full"), B, 12, HKV)
    sizes = {
        "batch": (B + 1, H, HKV, 4, DH),
        "heads": (B, 8, HKV, 4, DH),
        "key heads": (B, H, 4, 4, DH),
    }
    q, k, v = draw(*sizes.get(change, (B, H, HKV, 4, 32 if change == "head_dim" else DH)))
    if change == "dtype":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    with pytest.raises(ValueError, match="cache: built for .*build one for this model and batch"):
        cache.attend(q, k, v, torch.zeros(q.shape[0], 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": [1.0]}, "q: expected a tensor; got list"),
        (
            {"k": torch.zeros(B, HKV, DH)},
            r"k: expected 4 dimensions \[B, H, T, Dh\]; got shape \(3, 2, 16\)",
        ),
        ({"linear_q": [1.0]}, "linear_q: expected a tensor; got list"),
        ({"lengths": [1, 1, 1]}, "lengths: expected a tensor; got list"),
        ({"route": [[0]]}, "route: expected a tensor; got list"),
        ({"route": 2}, "route: expected values in 0..1; got 2"),
        ({"route": torch.full((B, 1), -1)}, "route: expected values in 0..1; got -1..-1"),
        ({"route": torch.zeros(B, 1, 3)}, r"route: expected \[B, T, R\] or \[B, T, R, 2\]"),
        (
            {"backend": "trtion"},
            "backend: expected one of auto, dense, reference, short, torch, triton; got 'trtion'",
        ),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    cache, (q, k, v) = LayerCache(build("full", "gated"), B, 12, HKV), draw(B, H, HKV, 1, DH)
    arguments = {"q": q, "k": k, "v": v, "route": torch.zeros(B, 1, dtype=torch.int64), **changes}
    with pytest.raises(ValueError, match=message):
        cache.attend(**arguments)  # type: ignore[arg-type]
    assert cache.lengths.tolist() == [0] * B


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_key_heads_that_do_not_divide_the_query_heads_are_refused(heads: int) -> None:
    with pytest.raises(
        ValueError,
        match=f"num_kv_heads: expected a number that divides the 4 query heads; got {heads}",
    ):
        LayerCache(build("full"), B, 12, heads)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1, 2], "index: expected a tensor; got list"),
        (
            torch.tensor([0, 1]),
            "index: expected int64 of shape .3,. on cpu; got torch.int64 of shape .2,.",
        ),
        (torch.tensor([0, 1, 3]), "index: expected rows 0..2; got .0, 1, 3."),
        (torch.tensor([0.0, 1.0, 2.0]), "index: expected int64"),
    ],
)
def test_bad_reorderings_are_refused(index: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerCache(build("full"), B, 12, HKV).reorder(index)


def test_a_cache_knows_whose_it_is() -> None:
    """By the objects: another model has the same sizes and names, and other gates."""
    experts, others = build("full", "gated"), build("full", "gated")
    cache = LayerCache(experts, B, 12, HKV)
    cache.check_owner(torch.nn.ModuleList(experts))
    for wrong in (others, experts[:1], (*experts, *others), experts[::-1], build("full", "linear")):
        with pytest.raises(
            ValueError,
            match=r"layer 2.experts: expected this layer's own experts, \(.* \(4, 16, 9, 0\)",
        ):
            cache.check_owner(wrong, "layer 2")


def test_local_attention_with_sinks_is_refused() -> None:
    local = expert_class("local")(SHAPE._replace(sinks=4))
    with pytest.raises(ValueError, match="sinks: expected 0, .* got 4"):
        LayerCache((*build("full"), local), B, T, HKV)


def test_the_whole_cache_moves_on_when_its_last_layer_has() -> None:
    cache, inputs, route = (
        RoutedCache.build([build("full"), build("local")], B, T, HKV),
        tensors(),
        draw_route("full", B, T),
    )
    assert len(cache) == 2 and cache.capacity == T
    feed(cache[0], inputs, route, 0, 5)
    assert cache.lengths.tolist() == [0] * B
    feed(cache[1], inputs, route, 0, 5)
    assert cache.lengths.tolist() == [5] * B
    assert cache.bytes == cache[0].bytes + cache[1].bytes
    cache.reorder(torch.tensor([1, 0, 2]))
    cache.reset()
    assert cache.lengths.tolist() == [0] * B
