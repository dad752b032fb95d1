"""What a patch does not serve: refused by name when it is patched, or named in a warning.

Never skipped in silence.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayes_router.config import PriorConfig, ScheduleConfig
from bayes_router.integrations.huggingface import interface
from bayes_router.integrations.huggingface import patching as patching_module
from bayes_router.integrations.patching import patch
from bayes_router.routing.policy import Argmax
from tests.integrations.dense import dense_attention
from tests.integrations.test_torch_attention import D, H, draw, encoder, scatter
from tests.integrations.tiny_models import (
    DECODERS,
    GENERAL,
    VOCAB,
    scatter_routes,
    tiny,
    tokens,
    transformers,
)

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}


def t5_encoder(kernel: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(
        transformers.T5Config(**T5, attn_implementation=kernel)
    ).eval()
    nn.init.normal_(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    return model


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_position_biases_of_t5_are_part_of_the_mask(kernel: str) -> None:
    model, ids = t5_encoder(kernel), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    before = model(ids).last_hidden_state, model(ids, attention_mask=mask).last_hidden_state
    router = patch(model, window=80)
    router.force("full")
    assert torch.equal(model(ids).last_hidden_state, before[0])
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, before[1])
    router.force("local")  # a window that hides nothing
    torch.testing.assert_close(model(ids).last_hidden_state, before[0], atol=1e-5, rtol=1e-4)
    router.unpatch()
    router = patch(model, window=6)
    scatter_routes(router)
    # every expert, hard
    router.policy = lambda concentration: torch.arange(ids.numel()).view(ids.shape) % 3
    together = model(ids, attention_mask=mask).last_hidden_state
    one_hot = nn.functional.one_hot(torch.arange(ids.numel()).view(ids.shape) % 3, 3).float()
    with router.routed_by(lambda layer, hidden: one_hot):
        soft = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(together[mask.bool()], soft[mask.bool()], atol=1e-5, rtol=1e-4)


def test_what_a_mixed_route_cannot_execute_is_refused_when_it_is_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as if it were unknown
    monkeypatch.setattr(interface, "folded", lambda mask, kwargs, *_: (mask, kwargs))
    model = t5_encoder()
    with pytest.raises(ValueError, match="T5EncoderModel.*routed differently.*not served"):
        patch(model, window=6)
    assert model.config._attn_implementation == "sdpa" and not any(
        m._forward_pre_hooks for m in model.modules()
    )
    monkeypatch.undo()
    monkeypatch.setattr(patching_module, "probe", lambda model: torch.full((1, 8, 4), torch.nan))
    with pytest.raises(ValueError, match="not served"):
        patch(tiny("llama"))


def test_layers_that_share_one_module_are_refused() -> None:
    model = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**{**GENERAL, "embedding_size": 16})
    ).eval()
    with pytest.raises(ValueError, match="AlbertForMaskedLM.*runs 2 times.*not served"):
        patch(model)


def llava(vision: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=transformers.LlamaConfig(**GENERAL),
        image_token_index=VOCAB - 1,
        image_seq_length=4,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": vision})
    return model


@pytest.mark.parametrize("vision", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_that_no_token_reaches_is_named_and_left_as_it_was(vision: str) -> None:
    model, ids = llava(vision), tokens(1, 12)
    ids[ids == VOCAB - 1] = 5
    ids[0, 2:6] = VOCAB - 1
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    before = model(**inputs).logits
    with pytest.warns(UserWarning, match=r"vision_tower.*2 modules.*not routed"):
        router = patch(model, window=6)
    assert len(router.layers) == 2 and torch.equal(model(**inputs).logits, before)
    router.force("local")
    assert not torch.equal(model(**inputs).logits, before)
    router.unpatch()
    assert (
        torch.equal(model(**inputs).logits, before)
        and model.model.vision_tower.config._attn_implementation == vision
    )


@pytest.mark.parametrize("name", DECODERS)
def test_nothing_is_left_out_of_the_named_architectures(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(tiny(name), window=6)


class Detr(nn.Module):
    """Positions are added to queries and keys, not to values."""

    def __init__(self, twice: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.twice = nn.MultiheadAttention(D, H, batch_first=True), twice

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q = x + position
        k = x + position if self.twice else q
        out: Tensor = self.attention(q, k, x, need_weights=False)[0]
        return out


@torch.no_grad()
def test_attention_whose_values_have_no_positions_is_routed() -> None:
    model, x, position = Detr().eval(), draw(), draw(seed=9)
    before = model(x, position)
    router = patch(model, window=5)
    assert torch.equal(model(x, position), before)
    scatter(router)
    routed = model(x, position)
    route = router.last.executed[0]
    assert len(route.unique()) == 3
    module, weight = model.attention, model.attention.in_proj_weight
    v = x @ weight[2 * D :].T + module.in_proj_bias[2 * D :]
    expected = dense_attention(
        module, router.layers[0], x + position, route, None, None, window=5, value=v
    )
    torch.testing.assert_close(routed, expected, atol=2e-5, rtol=1e-4)


def test_calls_that_look_like_cross_attention_are_named_once() -> None:
    model = Detr(twice=True).eval()
    before = model(draw(), draw(seed=9))
    router = patch(model, window=5)
    router.force("local")
    with pytest.warns(UserWarning, match="attention: .*query is not its key.*not routed") as caught:
        assert torch.equal(model(draw(), draw(seed=9)), before)
        model(draw(), draw(seed=9))
    assert len(caught) == 1


def test_torch_modules_in_training_mode_give_no_weights_and_say_so() -> None:
    module = nn.MultiheadAttention(D, H, batch_first=True).train()
    router, x = patch(module, window=5), draw()
    with pytest.raises(
        ValueError, match="need_weights: expected False.*training mode draws routes"
    ):
        module(x, x, x)
    assert module(x, x, x, need_weights=False)[1] is None
    router.force("full")
    assert module(x, x, x)[1] is not None


def dynamically_quantised(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return made


@pytest.mark.parametrize("build", [lambda: tiny("llama"), lambda: encoder().eval()])
def test_packed_quantised_weights_are_refused(build: Any) -> None:
    model = dynamically_quantised(build())
    with pytest.raises(ValueError, match=r"quantised weights.*quantized\.dynamic"):
        patch(model)


def test_a_model_that_says_it_is_quantised_is_refused() -> None:
    model = tiny("llama")
    model.is_quantized = True
    with pytest.raises(
        ValueError, match="LlamaForCausalLM with quantised weights.*without quantization_config"
    ):
        patch(model)
    model.config.quantization_config = (
        transformers.GgufConfig() if hasattr(transformers, "GgufConfig") else _Gguf()
    )
    patch(model)  # floats, once they are loaded


class _Gguf:
    quant_method = "gguf"


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (torch.ones(2, 2), "^prior: expected a PriorConfig; got 'Tensor'"),
        (
            PriorConfig(cost_ratio=(1.0, 0.2, 0.3, 0.4)),
            r"^prior.cost_ratio: expected .* full, mapped, local; got \(1.0, 0.2, 0.3, 0.4\)",
        ),
    ],
)
def test_a_prior_that_is_none_of_the_patchs_is_refused(prior: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch(tiny("llama"), window=6, prior=prior)


@pytest.mark.parametrize("given", ["gpt2", None, {"model": 1}])
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="model: expected a torch module.*got"):
        patch(given)


def test_what_is_no_policy_or_config_is_refused_when_it_is_given() -> None:
    for given in (3, Argmax):
        with pytest.raises(ValueError, match="^policy: expected a policy"):
            patch(tiny("llama"), policy=given)
    with pytest.raises(ValueError, match="^config: expected a RouterConfig; got 'str'"):
        patch(tiny("llama"), config="routed")


def test_a_model_that_never_decodes_has_no_budget_in_bytes() -> None:
    router = patch(tiny("bert"), window=6)
    for asked in (lambda: router.set_budget(0.5, by="bytes"), lambda: router.fit("x", by="bytes")):
        with pytest.raises(ValueError, match="by: expected flops.*both sides.*got 'bytes'"):
            asked()


def test_routes_of_other_units_or_experts_are_refused() -> None:
    router = patch(tiny("llama"), window=6, route_by="head")
    for force in (
        torch.zeros(2, 2, 9, 3, dtype=torch.int64),
        torch.full((2, 2, 9, 4), 3),
        torch.zeros(2, 2, 9),
        torch.zeros(2, 2, 9, 4, 2),
    ):
        with pytest.raises(ValueError, match="^force: expected"):
            router.force(force)
    assert not router.forced


def test_an_unpatched_router_says_so() -> None:
    model = tiny("llama")
    router = patch(model, window=6)
    router.unpatch()
    text = torch.randint(3, VOCAB, (200,))
    for use in (
        lambda: router(tokens()),
        lambda: router.set_budget(0.5, text, context=20),
        lambda: router.fit(text, steps=1, context=20),
        lambda: router.unrouted(tokens()),
    ):
        with pytest.raises(
            ValueError, match="router: expected a patched model; got 'LlamaForCausalLM, unpatched"
        ):
            use()
    module = encoder().eval()
    router = patch(module, window=5)
    router.unpatch()
    with pytest.raises(ValueError, match="unpatched"):
        router(draw())
    with pytest.raises(ValueError, match="unpatched"):
        router.fit([draw()])


def test_models_without_a_language_head_say_so_before_they_run() -> None:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**GENERAL)).eval()
    router = patch(model, window=6)
    with pytest.raises(
        ValueError, match="language-modelling head; got 'BertForSequenceClassification"
    ):
        router(tokens())


@pytest.mark.parametrize(
    ("names", "message"),
    [("full,local", "for each of its 4 units"), ("nosuch", "expected one of .*got 'nosuch'")],
)
def test_a_start_that_fits_no_layer_is_refused_before_the_fit(names: str, message: str) -> None:
    router = patch(tiny("llama"), window=8, route_by="head")
    with pytest.raises(ValueError, match=f"^schedule.start_experts: .*{message}"):
        router.fit("a text " * 100, schedule=ScheduleConfig(start_experts=(names,)))
