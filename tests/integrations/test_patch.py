"""What a patch is: fitted by SVI, budgeted, saved, idempotent.

Copied with its model, read by diagnostics; and refusals.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bayes_router.config import Config, PriorConfig
from bayes_router.diagnostics.fitted import build_program
from bayes_router.diagnostics.measures.collapse import CollapseSummary
from bayes_router.diagnostics.measures.uncertainty import UncertaintySummary
from bayes_router.diagnostics.reading import read
from bayes_router.integrations.patch.saving import BASE, SETTINGS, WEIGHTS
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.training.evaluate import evaluate
from tests.integrations.tiny_models import (
    FALCON,
    GPT2,
    GROUPED,
    VOCAB,
    patched,
    tiny,
    tokens,
    transformers,
)

TEXT = torch.randint(3, VOCAB, (200,), generator=torch.Generator().manual_seed(0)).repeat(6)
QUICK = {"steps": 12, "distil_steps": 12, "context": 32, "batch_size": 2}


class Words:
    """A tokenizer as small as a test."""

    eos_token_id, mask_token_id = 2, 3

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [4 + ord(letter) % (VOCAB - 4) for letter in text]}


@pytest.fixture(scope="module")
def fitted() -> Any:
    router = patch(tiny("llama"), window=6)
    frame = router.fit(TEXT, **QUICK)
    return router, frame


def test_fit_learns_and_leaves_the_weights_alone(fitted: Any) -> None:
    router, frame = fitted
    errors = frame.attrs["distillation"]
    assert len(frame) == 12 and frame[["nll", "kl"]].notna().all().all()
    assert sum(errors[-4:]) < sum(errors[:4])
    assert not router.training and all(p.requires_grad for p in router.model.parameters())
    assert all(p.grad is None for p in router.model.parameters())
    router.unpatch()
    assert torch.equal(router.model(tokens()).logits, tiny("llama")(tokens()).logits)
    router.undo.clear()


def test_fit_moves_the_weights_where_asked() -> None:
    model = tiny("llama")
    before = [p.clone() for p in model.parameters()]
    patch(model, window=6).fit(TEXT, weights_lr=1e-3, **{**QUICK, "steps": 3})
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_fit_reads_text_and_masked_language_models() -> None:
    text = ["a sentence or two, over and over. " * 20, "and another one. " * 20]
    decoder, encoder = patch(tiny("gpt2"), window=6), patch(tiny("bert"), window=6)
    for router in (decoder, encoder):
        frame = router.fit(text, tokenizer=Words(), **{**QUICK, "steps": 3})
        assert frame["nll"].between(0.1, 20).all()
        router.set_budget(0.5, context=32)


def test_the_literal_elbo_is_nll_plus_kl() -> None:
    _, router = patched("llama")
    model, guide = router.program()
    from bayes_router.inference.elbo import NegativeELBO

    torch.manual_seed(0)
    loss, terms = NegativeELBO(model, guide, router.kl_weight)(tokens(), tokens())
    assert 0 < router.kl_weight < 1
    torch.testing.assert_close(loss, terms.nll + router.kl_weight * terms.kl, rtol=1e-4, atol=1e-5)


def test_saved_patch_gives_the_same_outputs_and_holds_nothing_else(tmp_path: Path) -> None:
    model, router = patched("llama", sinks=2, prior=PriorConfig(temperature=0.7))
    router.set_budget(0.5, TEXT, context=50)
    with torch.no_grad():
        routed = model(tokens()).logits
        router.save(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, SETTINGS, BASE, "README.md"}
        assert (tmp_path / WEIGHTS).stat().st_size < 200_000
        router.unpatch()
        loaded = load_patch(model, tmp_path)
        assert torch.equal(model(tokens()).logits, routed)
        assert loaded.policy == router.policy and loaded.settings == router.settings
        assert load_patch(model, tmp_path) is loaded  # patched alike already
        load_patch(tiny("llama").bfloat16(), tmp_path)  # the same model in another precision


def test_weights_that_moved_are_said_when_a_patch_is_saved_and_when_it_is_loaded(
    tmp_path: Path,
) -> None:
    model = tiny("llama")
    router = patch(model, window=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.save(tmp_path)
    router.fit(TEXT, weights_lr=1e-3, **{**QUICK, "steps": 3})
    with pytest.warns(UserWarning, match="its own weights moved.*save_pretrained"):
        router.save(tmp_path)
    with pytest.raises(ValueError, match="was made for.*had moved when it was saved"):
        load_patch(tiny("llama"), tmp_path)
    model.save_pretrained(tmp_path / "model")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    loaded = load_patch(again, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.save(tmp_path / "again")  # a model that is on disk
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_load_checks_the_model_and_the_files(tmp_path: Path) -> None:
    model, router = patched("llama")
    router.save(tmp_path)
    with pytest.raises(ValueError, match="was made for"):
        load_patch(tiny("llama", seed=1), tmp_path)
    with pytest.raises(ValueError, match="was made for"):
        load_patch(tiny("gpt2"), tmp_path)
    router.unpatch()
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=WEIGHTS):
        load_patch(model, tmp_path)
    assert not any("_bayes_router" in m.__dict__ for m in model.modules())  # undone
    (tmp_path / SETTINGS).write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        load_patch(model, tmp_path)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(ValueError, match="missing"):
        load_patch(model, tmp_path)


def test_patching_is_idempotent() -> None:
    model = tiny("llama")
    router = patch(model, window=6)
    assert patch(model, window=6) is router
    with pytest.raises(ValueError, match="unpatch"):
        patch(model, window=7)
    router.unpatch()
    router.unpatch()
    assert patch(model, window=7) is not router


def test_two_models_of_one_configuration_stay_apart() -> None:
    config = transformers.LlamaConfig(**GROUPED)
    torch.manual_seed(0)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    ids = tokens()
    with torch.no_grad():
        before = second(ids).logits
        patch(first, window=4).force("local")
        assert torch.equal(second(ids).logits, before)


def test_a_copy_routes_by_itself() -> None:
    model, router = patched("llama")
    twin = copy.deepcopy(model)
    ids = tokens()
    with torch.no_grad():
        routed = model(ids).logits
        assert torch.equal(twin(ids).logits, routed)
        router.unpatch()
        assert torch.equal(twin(ids).logits, routed) and not torch.equal(model(ids).logits, routed)


def test_mode_and_flags_follow_the_model() -> None:
    model = tiny("llama")
    model.requires_grad_(False)
    router = patch(model, window=6)
    assert not any(p.requires_grad for p in router.parameters()) and not router.training
    model.train()
    assert router.training and router.train(False) is router and not model.training
    model.train()
    model(tokens())
    assert router.last.executed[0].is_floating_point()  # draws, in training mode
    assert not set(router.state_dict()) & set(model.state_dict())
    assert model.state_dict().keys() == tiny("llama").state_dict().keys()


def test_layers_sinks_and_some_layers_only() -> None:
    model, router = patched("llama", layers=(1,))
    assert len(router.layers) == 1 and router.found[0].name == "model.layers.1.self_attn"
    assert router(tokens()).concentration.shape[0] == 1


def test_evaluation_and_diagnostics_read_a_patched_model() -> None:
    _, router = patched("llama")
    router.fit(TEXT, **{**QUICK, "steps": 1, "distil_steps": 0})
    result = evaluate(router, router.held_out, router.prior.concentration, context=20, batch_size=2)
    assert 0 < result.executed_cost["paper"] <= 1 and len(result.load_per_layer) == 2
    readings = list(read(router, router.held_out.windows(20, 2, 80)))
    collapse, uncertainty = (
        CollapseSummary(router.program()[0], router.experts),
        UncertaintySummary(router.cost_ratio),
    )
    for reading in readings:
        collapse.add(reading)
        uncertainty.add(reading)
    assert uncertainty.tokens == 80 and len(uncertainty.layers())
    assert len(router.statistics()) == 2 and float(router.kl().detach()) > 0


def test_a_program_of_ones_own_is_built_as_for_any_routed_model() -> None:
    _, router = patched("gpt2")
    program, guide, prior, _ = build_program(Config(model=router.config), router)
    trace = guide(tokens(), tokens())
    assert trace["route_1"].shape == (2, 40, 4) and len(prior.mean) == 2
    assert not list(program.parameters())  # the model's weights are not the program's to fit


def _no_attention() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)
    )


REFUSED = {
    "another architecture": (
        lambda: transformers.MptForCausalLM(
            transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=VOCAB)
        ),
        "MptForCausalLM.*not served",
    ),
    "no attention": (_no_attention, "MambaForCausalLM.*not served"),
    "encoder-decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB
            )
        ),
        "T5ForConditionalGeneration, an encoder-decoder",
    ),
    "meta device": (lambda: tiny("llama").to("meta"), "meta device"),
    "eager falcon": (
        lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(**FALCON, attn_implementation="eager")
        ),
        "sdpa for Falcon",
    ),
    "upcast GPT-2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                **GPT2, reorder_and_upcast_attn=True, attn_implementation="eager"
            )
        ),
        "reorder_and_upcast_attn",
    ),
    "flex": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**GROUPED, attn_implementation="flex_attention")
        ),
        "sdpa or eager",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_name(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        patch(build())


def test_quantised_weights_are_refused() -> None:
    model = tiny("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        patch(model)


def test_settings_are_checked() -> None:
    for wrong, message in (
        ({"window": 0}, "window"),
        ({"experts": ("mapped", "local")}, "full"),
        ({"experts": ("full", "fast")}, "experts"),
        ({"layers": (5,)}, "layers"),
        ({"sinks": -1}, "sinks"),
    ):
        model = tiny("llama")
        with pytest.raises(ValueError, match=message):
            patch(model, **wrong)
        assert model.config._attn_implementation == "sdpa"  # nothing is left behind
    _, router = patched("llama")
    with pytest.raises(ValueError, match="force"):
        router.force("fast")
    with pytest.raises(ValueError, match="tokenizer"):
        router.fit("text without a tokenizer")
