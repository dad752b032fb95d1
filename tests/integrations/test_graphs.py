"""The setting `graphs` of a patched language model."""

import copy
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.0")
from transformers import DynamicCache, StaticCache  # noqa: E402

from bayes_router.integrations.huggingface import graphs as engine  # noqa: E402
from bayes_router.integrations.huggingface.model import RoutedPretrained  # noqa: E402
from bayes_router.integrations.patch.binding import router_of  # noqa: E402
from bayes_router.integrations.patching import patch  # noqa: E402
from bayes_router.routing.policy import Budget  # noqa: E402
from bayes_router.routing.watch import inputs_of  # noqa: E402
from bayes_router.transformer.frozen import Frozen  # noqa: E402
from tests.integrations.graphs_anywhere import Again, install  # noqa: E402
from tests.integrations.tiny_models import patched, tokens  # noqa: E402


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def model_and_router(name: str = "llama", **settings: Any) -> tuple[Any, Any]:
    model, router = patched(name, experts=("full", "local"), window=5, **settings)
    return model, router


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prompt_is_read_from_a_bucket_and_routed_as_ever(anywhere: None) -> None:
    model, router = model_and_router()
    ids = tokens(2, 70)
    expected = model(ids).logits
    routes = {i: x.clone() for i, x in router.last.executed.items()}
    kl, cost = router.kl(), router.statistics()[0].cost
    router.graphs = True
    for length in (70, 66):  # one graph of 128 tokens
        out = model(ids[:, :length])
        close(out.logits, expected[:, :length])
        assert router.last.replayed and router.last.as_called is None
    assert (Again.captured, Again.replayed) == (1, 2)
    out = model(ids, use_cache=False)
    assert out.past_key_values is None
    assert all(torch.equal(router.last.executed[i], x) for i, x in routes.items())
    close(router.kl(), kl)
    assert router.statistics()[0].cost == pytest.approx(cost)
    grown = model(ids[:, :60]).past_key_values
    assert grown.get_seq_length() == 60
    close(model(ids[:, 60:], past_key_values=grown).logits, expected[:, 60:])
    assert "several" in router.last.as_called or "grows" in router.last.as_called


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 9])
def test_generate_takes_its_steps_from_a_graph(anywhere: None, padded: int) -> None:
    model, router = model_and_router()
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **asked)
    router.graphs = True
    for _ in range(2):  # the second from the keys and the graphs of the first
        found = model.generate(ids, cache_implementation="static", **asked)
        assert torch.equal(found, expected) and router.last.replayed
    assert Again.replayed == 2 * (7 + (not padded))
    assert Again.captured == 1 + (not padded) if not padded else Again.captured <= 2


@torch.no_grad()
def test_two_caches_at_once_have_keys_of_their_own(anywhere: None) -> None:
    model, router = model_and_router()
    router.graphs = True
    texts = tokens(1, 30), tokens(1, 30).flip(1)
    expected = [model(ids).logits for ids in texts]
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in texts]
    for ids, cache in zip(texts, caches, strict=True):
        model(ids[:, :28], past_key_values=cache)
    for t in (28, 29):
        for ids, cache, whole in zip(texts, caches, expected, strict=True):
            close(model(ids[:, t, None], past_key_values=cache).logits[:, 0], whole[:, t])
            assert router.last.replayed
    assert caches[0].layers[0].keys.data_ptr() != caches[1].layers[0].keys.data_ptr()
    kept = caches[0].layers[0].keys
    caches[0].reset()
    model(texts[1][:, :28], past_key_values=caches[0])  # its own keys, written anew
    assert caches[0].layers[0].keys is kept
    found = model(texts[1][:, 28:29], past_key_values=caches[0]).logits[:, 0]
    close(found, expected[1][:, 28])


@torch.no_grad()
def test_what_changes_is_captured_anew(anywhere: None) -> None:
    model, router = model_and_router()
    ids, norm = tokens(1, 40), model.model.norm
    router.graphs = True
    model(ids)
    model(ids.flip(1))
    changes: list[Callable[[], Any]] = [
        lambda: setattr(router, "policy", Budget(tuple(router.cost_ratio.tolist()), price=0.5)),
        lambda: router.controller.layers[0].out.bias.add_(torch.tensor([0.3, -0.3])),
        lambda: setattr(norm, "weight", nn.Parameter(norm.weight.detach() * 0.5)),
        lambda: setattr(router, "full_up_to", 20),
        lambda: setattr(router, "graphs", True),
    ]
    for count, change in enumerate(changes, 1):
        assert Again.captured == count
        change()
        found = model(ids).logits
        assert router.last.replayed and Again.captured == count + 1
        with router.routed_by(routes(router)):
            close(found, model(ids).logits)
    norm.weight.mul_(2)  # a graph reads weights where they are
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight)  # and the head is none of it
    model(ids)
    assert Again.captured == len(changes) + 1


@torch.no_grad()
def test_what_cannot_be_replayed_runs_as_called_and_says_why(anywhere: None) -> None:
    model, router = model_and_router()
    ids = tokens(2, 40)
    router.graphs = True
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    whole = torch.ones_like(ids)
    calls: dict[str, Callable[[], Any]] = {
        "padding": lambda: model(ids, attention_mask=mask),
        "positions": lambda: model(ids, position_ids=torch.arange(3, 43)[None]),
        "beside": lambda: model(ids, output_hidden_states=True),
        "one token": lambda: model(ids[:, :1]),
        "hook": lambda: hooked(model, ids),
        "forced": lambda: forced(router, model, ids),
        "gradients": lambda: torch.enable_grad()(model)(ids),
        "watched": lambda: watched(router, model, ids),
        "frozen": lambda: frozen(router, model, ids),
    }
    for why, call in calls.items():
        call()
        assert why in router.last.as_called, (why, router.last.as_called)
    assert Again.replayed == 0
    model(ids, attention_mask=whole, position_ids=torch.arange(40)[None])
    assert router.last.replayed
    model.train()
    model(ids)
    assert not router.last.replayed


def routes(router: Any) -> Callable[[int, Tensor], Tensor]:
    """Those of the last pass, as they are given from outside."""
    taken = {layer: x.clone() for layer, x in router.last.executed.items()}
    return lambda layer, hidden: taken[layer]


def hooked(model: Any, ids: Tensor) -> None:
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model(ids)
    handle.remove()


def watched(router: Any, model: Any, ids: Tensor) -> None:
    """The watch sees what it would see without graphs."""
    with torch.no_grad(), inputs_of(router.controller) as read:
        model(ids)
    assert len(read) == len(router.layers)


def frozen(router: Any, model: Any, ids: Tensor) -> None:
    router.frozen = Frozen(((1,) * router.config.num_units,) * len(router.layers))
    model(ids)
    router.thaw()


def forced(router: Any, model: Any, ids: Tensor) -> None:
    router.force("local")
    model(ids)
    router.force(None)


@torch.no_grad()
def test_a_short_text_is_left_to_full_with_its_padding(
    anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, router = model_and_router()
    router.graphs, router.full_up_to = True, 50
    lengths = []
    usual = engine.Graphs.prefill
    monkeypatch.setattr(
        engine.Graphs,
        "prefill",
        lambda self, ids, padded: lengths.append(padded) or usual(self, ids, padded),
    )
    model(tokens(1, 45), use_cache=False)
    model(tokens(1, 51), use_cache=False)
    assert lengths == [50, 64]


@torch.no_grad()
def test_keys_go_with_the_setting_and_not_with_the_collector(
    anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(self: Any, run: Callable[[], Any], back: Any = None) -> Any:
        return SimpleNamespace(replay=lambda: None), run()  # as a graph, which holds no function

    monkeypatch.setattr(engine.Graphs, "_capture", capture)
    model, router = model_and_router()
    router.graphs = True
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(tokens(1, 30), past_key_values=cache)
    model(tokens(1, 1), past_key_values=cache)
    keys = weakref.ref(cache.layers[0].keys)
    gc.disable()
    try:
        del cache
        assert keys() is not None  # for the next prompt
        router.graphs = False
        assert keys() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_off_unpatched_and_copied_it_is_gone(anywhere: None) -> None:
    model, router = model_and_router()
    ids = tokens(1, 30)
    router.graphs = True
    assert model.generation_config.disable_compile
    twin = copy.deepcopy(model)
    twin(ids)
    assert Again.replayed == 0
    own = router_of(twin)
    assert isinstance(own, RoutedPretrained)
    own.graphs = True
    twin(ids)
    assert own.last.replayed
    own.graphs = False
    own.unpatch()
    router.graphs = False
    assert not router.graphs and "forward" not in model.model.__dict__
    assert not model.generation_config.disable_compile
    router.graphs = True
    router.unpatch()
    assert "forward" not in model.model.__dict__ and not model.generation_config.disable_compile
    with pytest.raises(ValueError, match="router: expected a patched model"):
        router.graphs = True


def test_a_cpu_is_refused_and_left_unpatched() -> None:
    model, router = model_and_router()
    with pytest.raises(ValueError, match="graphs: expected a CUDA device; got 'cpu'"):
        router.graphs = True
    assert not router.graphs
    router.unpatch()
    with pytest.raises(ValueError, match="graphs: expected a CUDA device"):
        patch(model, experts=("full", "local"), graphs=True)
    assert not router.patched and "forward" not in model.model.__dict__
    patch(model, experts=("full", "local")).unpatch()
    with pytest.raises(ValueError, match="graphs: expected a causal language model"):
        patch(nn.TransformerEncoderLayer(16, 2, batch_first=True), graphs=True)


@pytest.mark.parametrize(
    ("name", "experts", "why"),
    [
        ("llama", ("full", "mapped", "local"), "experts of full and local"),
        ("mistral", ("full", "local"), "attention over all keys"),
        ("gemma2", ("full", "local"), "sdpa"),
    ],
)
def test_what_waits_or_slides_is_refused(
    anywhere: None, name: str, experts: tuple[str, ...], why: str
) -> None:
    _, router = patched(name, experts=experts)
    with pytest.raises(ValueError, match=f"graphs: expected {why}"):
        router.graphs = True


@torch.no_grad()
def test_a_growing_cache_given_empty_is_filled(anywhere: None) -> None:
    model, router = model_and_router()
    ids, cache = tokens(1, 40), DynamicCache(config=model_and_router()[0].config)
    expected = model(ids).past_key_values.layers[1].keys
    router.graphs = True
    model(ids, past_key_values=cache)
    assert router.last.replayed
    close(cache.layers[1].keys, expected)
    model(ids.flip(1), past_key_values=DynamicCache(config=model.config))
    close(cache.layers[1].keys, expected)  # a later replay leaves it alone


@torch.no_grad()
def test_without_a_store_the_keys_are_those_of_the_pass(anywhere: None) -> None:
    """Nothing is copied to a static cache, so that no step can follow."""
    model, _ = model_and_router()
    ids = tokens(1, 40)
    wanted = model(ids).past_key_values
    graphs = engine.Graphs(model, 64, bucket=16, stored=False)
    graphs.prefill(ids)
    for layer, (key, value) in zip(wanted.layers, graphs.keys, strict=True):
        close(key[:, :, :40], layer.keys)
        close(value[:, :, :40], layer.values)
    assert not any(layer.is_initialized for layer in graphs.cache.layers)
    with pytest.raises(ValueError, match="step"):
        graphs.step(ids[:, :1])


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_what_changed_since_a_replay_was_launched_is_seen_before_its_answer(
    static: bool, anywhere: None
) -> None:
    """Modules are looked at while the device reads, or before it writes into a caller's keys."""
    model, router = model_and_router()
    ids = tokens(2, 40)

    def read() -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=48) if static else None
        return model(ids, past_key_values=cache).logits

    router.graphs = True
    read()
    old, heard = read(), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    replayed = Again.replayed
    close(read(), old)
    assert "a hook on" in router.last.as_called
    assert Again.replayed - replayed == (not static)  # whose answer nobody saw
    assert len(heard) == 1 + (not static)  # a graph's stand-in calls modules
    close(read(), old)
    assert Again.replayed - replayed == (not static)  # looked for first by now
    handle.remove()
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)
    captured, found = Again.captured, read()
    assert router.last.replayed and Again.captured == captured + 1
    router.graphs = False
    close(found, read())
    assert not torch.allclose(found, old, atol=1e-3)
    router.graphs = True
    read()
    weight, captured = model.model.layers[0].mlp.down_proj.weight, Again.captured
    weight.data = 2 * weight.data  # elsewhere
    other = read()
    assert router.last.replayed and Again.captured == captured + 1
    router.graphs = False
    close(other, read())
