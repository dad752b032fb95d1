"""Nothing of a call lives on the model: threads, copies and pickles; means are over real tokens.

A graph goes with its pass.
"""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bayes_router.integrations.patch import routed as routed_module
from bayes_router.integrations.patch.binding import Binding
from bayes_router.integrations.patch.passes import Here
from bayes_router.integrations.patching import patch
from bayes_router.routing.information import context_information
from bayes_router.routing.posterior import posterior_mean
from bayes_router.routing.watch import inputs_of
from bayes_router.transformer.fused import called, watched
from bayes_router.types import RoutingMode
from tests.integrations.test_torch_attention import draw, encoder, scatter
from tests.integrations.tiny_models import left_padded, patched, tiny, tokens


def routed_encoder(**settings: Any) -> tuple[nn.TransformerEncoder, Any]:
    model = encoder(**settings).eval()
    router = patch(model, window=5)
    scatter(router)
    return model, router


@pytest.mark.parametrize("name", ["llama", "falcon", "torch"])
@torch.no_grad()
def test_threads_answer_as_alone(name: str) -> None:
    model, router = routed_encoder() if name == "torch" else patched(name)
    inputs = [draw(seed=i)[:1] if name == "torch" else tokens(1, 16, seed=i) for i in range(6)]

    def call(x: Tensor) -> tuple[Tensor, float]:
        if name == "torch":
            return model(x), float(router.kl())
        out = router(x) if name == "llama" else model(x)
        return out.logits, float(router.kl().detach())

    alone = [call(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for (out, kl), (expected, expected_kl) in zip(
                pool.map(call, inputs), alone, strict=True
            ):
                torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
                assert kl == pytest.approx(expected_kl, rel=1e-5)


def padded(ids: Tensor, extra: int, side: str) -> dict[str, Tensor]:
    part = slice(0, ids.shape[1]) if side == "right" else slice(extra, None)
    whole, mask = (torch.zeros(len(ids), ids.shape[1] + extra, dtype=torch.long) for _ in range(2))
    whole[:, part], mask[:, part] = ids, 1
    return {
        "input_ids": whole,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("llama", "sdpa"), ("gemma2", "eager"), ("mistral", "sdpa"), ("bert", "sdpa")],
)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("route_by", ["layer", "kv_head", "head"])
def test_padding_counts_nowhere(name: str, route_by: str, side: str, kernel: str) -> None:
    model = tiny(name)
    model.set_attn_implementation(kernel)
    router = patch(model, window=6, route_by=route_by)
    scatter(router)
    ids, read = tokens(2, 12), []
    for extra in (0, 30):
        router.zero_grad()
        model(**padded(ids, extra, side))
        router.kl().backward()
        statistics = [
            (*one.load, one.cost, one.total_concentration, one.route_information)
            for one in router.statistics()
        ]
        read.append(
            (float(router.kl()), statistics, router.controller.layers[0].out.bias.grad.clone())
        )
    (kl, statistics, gradient), (other_kl, other, other_gradient) = read
    assert other_kl == pytest.approx(kl, rel=1e-4) and torch.allclose(
        gradient, other_gradient, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(torch.tensor(other), torch.tensor(statistics), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("given", ["bool", "float"])
def test_padding_counts_nowhere_in_torch(batch_first: bool, given: str) -> None:
    model, router = routed_encoder(batch_first=batch_first)
    x = draw(batch_first)
    time = 1 if batch_first else 0
    whole = torch.cat([x, torch.zeros_like(x)], time)
    hidden = (torch.arange(40) >= 20).expand(3, -1)
    mask = hidden if given == "bool" else torch.zeros(3, 40).masked_fill(hidden, -torch.inf)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(x)
            kl, load = float(router.kl()), router.statistics()[1].load
            model(whole, src_key_padding_mask=mask)
            assert float(router.kl()) == pytest.approx(kl, rel=1e-4) and router.statistics()[
                1
            ].load == pytest.approx(load)


def round_trip(module: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["llama", "falcon", "torch"])
def test_copies_route_alike_and_are_unpatched_alone(name: str, how: str) -> None:
    plain = encoder().eval() if name == "torch" else tiny(name)
    model, router = routed_encoder() if name == "torch" else patched(name)
    x = draw() if name == "torch" else tokens()

    def call(module: Any) -> Tensor:
        out = module(x)
        return out if name == "torch" else out.logits

    # a pass with gradients went before
    routed, unrouted = call(model).detach(), call(plain).detach()
    assert not torch.allclose(routed, unrouted, atol=1e-4)
    for other in (round_trip(router, how).model, round_trip(model, how)):
        assert torch.equal(call(other).detach(), routed)
        mine = next(m._bayes_router.router for m in other.modules() if hasattr(m, "_bayes_router"))
        assert mine.model is other and mine is not router
        assert torch.equal(call(mine.unpatch()).detach(), unrouted) or name == "torch"
        torch.testing.assert_close(call(other).detach(), unrouted, atol=1e-5, rtol=1e-5)
        assert torch.equal(call(model).detach(), routed) and router.patched


@pytest.mark.parametrize("train", [True, False])
def test_no_graph_outlives_its_backward_pass_unless_it_is_held(train: bool) -> None:
    model, router = patched("llama")
    model.train(train)
    seen: list[Any] = []
    handle = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(weakref.ref(kwargs["hidden_states"])),
        with_kwargs=True,
    )
    out = model(tokens(), labels=tokens())
    handle.remove()
    held, kl = router.last, float(router.kl())
    assert router.kl().requires_grad
    (out.loss + 0.01 * router.kl()).backward(retain_graph=True)
    # the numbers stay
    assert not router.kl().requires_grad and float(router.kl()) == pytest.approx(kl)
    router.kl(held).backward()
    del out, held
    gc.collect()
    assert seen[0]() is None
    assert len(router.statistics()) == 2


def test_reentrant_checkpointing_is_refused_and_the_other_gives_the_same_gradient() -> None:
    found = []
    for kind in (None, False, True):
        model, router = patched("llama")
        model.requires_grad_(False), router.requires_grad_(True)
        model.train()
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        if kind:
            with pytest.raises(ValueError, match="use_reentrant"):
                model(tokens(), use_cache=False)
            router.requires_grad_(False)
            model(tokens(), use_cache=False)  # nothing to train: nothing is lost
            continue
        (model(tokens(), labels=tokens(), use_cache=False).loss + 0.1 * router.kl()).backward()
        found.append(torch.cat([p.grad.flatten() for p in router.controller.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)
    module, router = routed_encoder()
    x = draw().requires_grad_()
    module.train()
    with pytest.raises(ValueError, match="use_reentrant"):
        checkpoint(module.layers[0], x, use_reentrant=True)


@pytest.mark.parametrize("how", ["patch", "pass"])
def test_what_inference_mode_made_can_be_trained(how: str) -> None:
    model = tiny("llama")
    with torch.inference_mode():
        if how == "patch":
            router = patch(model, window=6, experts=("full", "gated", "local"))
            model(tokens())
    if how == "pass":
        router = patch(model, window=6, experts=("full", "gated", "local"))
        model.double()
        with torch.inference_mode():
            model(tokens())
    assert not any(p.is_inference() for p in router.parameters())
    router.fit(torch.randint(3, 101, (300,)), steps=1, distil_steps=1, context=20, batch_size=2)


def test_a_model_made_in_inference_mode_is_not_fitted() -> None:
    with torch.inference_mode():
        router = patch(tiny("llama"), window=6)
    with pytest.raises(ValueError, match="weights made inside torch.inference_mode"):
        router.fit(torch.randint(3, 101, (300,)), steps=1, distil_steps=1, context=20, batch_size=2)


def test_a_pass_begins_at_the_first_layer_and_where_a_layer_comes_again() -> None:
    here, seen = Here(), []
    # the first pass skipped layer 0, as layer dropout does; the last is a layer called alone
    for layer in (1, 2, 0, 1, 1):
        here.begin(layer).real[layer] = None
        seen.append(sorted(here.slot.last.real))
    assert seen == [[1], [1, 2], [0], [0, 1], [1]]


@torch.no_grad()
def test_a_mode_is_taken_by_its_name_and_a_wrong_one_refused() -> None:
    model, router = patched("llama")
    x = tokens(1, 16)
    router.mode = RoutingMode.MEAN
    mean = model(x).logits
    router.mode = "mean"
    torch.testing.assert_close(model(x).logits, mean, atol=0, rtol=0)
    router.mode = None
    assert not torch.allclose(model(x).logits, mean)
    router.mode = "meen"
    with pytest.raises(ValueError, match=r"mode: expected one of .*'meen'; did you mean mean"):
        model(x)


def test_a_watched_controller_is_called_and_no_text_is_left_to_full() -> None:
    """Where a kernel or a short text would pass controllers by, evidence would see nothing."""
    _, router = patched("llama")
    layer = router.controller.layers[0]
    with torch.no_grad():
        assert router.executes and not watched(layer)
        with inputs_of(router.controller):
            assert watched(layer) and not router.executes and not called(layer)
            with layer.register_forward_pre_hook(lambda *_: None):
                assert called(layer)  # a hook of another's, which knows no kernel
        with layer.register_forward_hook(lambda *_: None):
            assert watched(layer) and not router.executes and called(layer)
        assert router.executes and not called(layer)


def test_statistics_tell_the_context_of_real_tokens_alone() -> None:
    model, router = patched("llama", experts=("full", "local"))
    ids, mask, _ = left_padded()
    model(ids, attention_mask=mask)
    real, q = mask.bool(), router.last.concentration
    for layer, one in enumerate(router.statistics(tokens=ids)):
        mean = posterior_mean(q[layer][:, :, 0][real])
        expected = context_information(ids[real], mean)
        assert one.context_information == pytest.approx(float(expected), abs=1e-6)
        assert one.context_information < one.route_information
    for other in (ids[:, 1:], ids[0], ids.tolist()):
        with pytest.raises(ValueError, match=r"tokens: expected the ids of that pass.*\[3, 24\]"):
            router.statistics(tokens=other)


@torch.no_grad()
def test_a_short_text_is_the_models_own_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to `full`, a layer's call is its own; what follows, or is looked at, is routed."""
    model, router = patched("llama", experts=("full", "local"), window=5)
    ids = tokens(2, 30)
    routed = model(ids).logits
    taken = []
    attend = Binding.attend
    monkeypatch.setattr(
        Binding, "attend", lambda self, call: taken.append(self.index) or attend(self, call)
    )
    monkeypatch.setattr(routed_module, "takes_full", lambda x, T, names, most: 1 < T <= most)
    router.full_up_to = 30
    found = model(ids)
    assert not taken and router.last.on_full == {0, 1} and not router.last.executed
    follows = model(ids[:, :4], past_key_values=found.past_key_values).logits
    assert taken == [0, 1] and router.last.on_full == set()
    router.force("local")
    assert torch.equal(model(ids[:, :20]).logits, model(ids).logits[:, :20])
    assert len(taken) == 6 and router.last.on_full == set()
    router.force(None)
    handle = router.controller.layers[0].register_forward_hook(lambda *_: None)
    close = torch.testing.assert_close
    close(model(ids).logits, routed)
    assert len(taken) == 8
    handle.remove()
    router.full_up_to = 29
    close(model(ids).logits, routed)
    router.force("full")
    whole = model(ids).past_key_values
    router.force(None)
    close(model(ids[:, :4], past_key_values=whole).logits, follows)
    before, second = len(taken), model.model.layers[1]
    hidden = torch.randn(2, 30, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(30)[None])
    for change in (lambda: router.force("local"), lambda: setattr(router, "full_up_to", 0)):
        router.full_up_to, broken = 30, second.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            model(ids, use_cache=False)  # its first layer was left, the second is another pass's
        broken.remove()
        change()
        second.self_attn(hidden, position_embeddings=angles, attention_mask=None)
        router.force(None)
    assert len(taken) == before + 2
    router.unpatch()
    assert torch.equal(found.logits, model(ids).logits)
    assert not torch.equal(found.logits, routed)


def stop(*_: Any) -> None:
    raise RuntimeError("stopped")
