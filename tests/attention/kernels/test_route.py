"""The router's kernel in Triton's interpreter, against its formula in plain torch."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from bayes_router.config import ModelConfig
from bayes_router.integrations.calls.fused_router import reference
from bayes_router.routing.controller import LayerController, MetaController
from bayes_router.routing.policy import Argmax, Budget, Policy
from bayes_router.transformer import fused as own
from bayes_router.transformer.fused import fused
from bayes_router.transformer.model import RoutedLanguageModel


@pytest.mark.parametrize("hidden", [0, 24, 64])
@pytest.mark.parametrize(("units", "experts"), [(1, 2), (1, 3), (9, 2), (3, 5)])
@pytest.mark.parametrize("tilted", [False, True])
def test_posterior_and_choice_are_the_formulas(
    hidden: int, units: int, experts: int, tilted: bool
) -> None:
    torch.manual_seed(hidden + units + experts)
    layer = LayerController(72, experts, hidden, units).requires_grad_(False)
    layer.out.weight.normal_(std=0.5)
    layer.out.bias.normal_(std=0.3)
    x = 3 * torch.randn(2, 37, 72)
    tilt = 0.3 * torch.randn(units, experts) if tilted else None
    concentration, choice = fused(x, layer, 0.01, tilt)
    expected, expected_choice = reference(x, layer, 0.01, tilt)
    torch.testing.assert_close(concentration, expected, rtol=2e-5, atol=1e-6)
    assert torch.equal(choice, expected_choice)
    assert choice.unique().numel() > 1


@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 300), (5, 300), (64, 1000), (65, 1100)])
def test_few_tokens_are_read_in_parts(hidden: int, tokens: int, dim: int) -> None:
    torch.manual_seed(tokens)
    layer = LayerController(dim, 2, hidden, 3).requires_grad_(False)
    layer.out.weight.normal_(std=0.3)
    x, tilt = 3 * torch.randn(tokens, 1, dim), 0.3 * torch.randn(3, 2)
    concentration, choice = fused(x, layer, 0.01, tilt)
    expected, expected_choice = reference(x, layer, 0.01, tilt)
    torch.testing.assert_close(concentration, expected, rtol=2e-5, atol=2e-6)
    assert torch.equal(choice, expected_choice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("hidden", "tokens", "dim"), [(0, 70, 48), (24, 70, 48), (24, 3, 300)])
def test_hidden_states_as_they_are(hidden: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    """Not normalised, weights in the type of the hidden states: as a language model's own."""
    torch.manual_seed(tokens)
    meta = MetaController(dim, 1, 3, hidden, num_units=2).requires_grad_(False)
    layer = meta.layers[0]
    assert isinstance(layer, LayerController)
    layer.out.weight.normal_(std=0.3)
    x = 3 * torch.randn(1, tokens, dim).to(dtype)
    layer.to(dtype)
    concentration, choice = fused(x, layer, meta.floor, None, normed=False)
    expected = meta.float().posterior(0, x.float()).concentration
    torch.testing.assert_close(concentration, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(choice, concentration.argmax(-1))


def test_small_and_large_concentrations_are_exact() -> None:
    """softplus far from 0: what is nearly the floor, and what is nearly linear."""
    layer = LayerController(16, 2, 0).requires_grad_(False)
    layer.out.bias.copy_(torch.tensor([-9.0, 40.0]))
    concentration, choice = fused(torch.randn(1, 3, 16), layer, 0.0, None)
    expected = torch.nn.functional.softplus(torch.tensor([-9.0, 40.0]).double())
    torch.testing.assert_close(
        concentration[0, :, 0].double(), expected.expand(3, 2), rtol=1e-5, atol=0
    )
    assert (choice == 1).all()


@pytest.mark.parametrize("hidden", [0, 64])
def test_halves_lose_nothing_of_the_weights(hidden: int) -> None:
    """Beside float16 inputs float32 weights are the sum of two halves (the interpreter has no
    bfloat16 products).
    """
    torch.manual_seed(0)
    layer = LayerController(72, 2, hidden, 3).requires_grad_(False)
    layer.out.weight.normal_()
    x = torch.randn(1, 40, 72).half()
    concentration, _ = fused(x, layer, 0.01, None)
    torch.testing.assert_close(
        concentration, reference(x, layer, 0.01, None)[0], rtol=5e-6, atol=2e-6
    )


@pytest.mark.parametrize("policy", [Argmax(), Budget((1.0, 0.15, 0.3), 0.5)])
def test_a_language_models_own_router(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, route_by="head")
    model = RoutedLanguageModel(config).eval().requires_grad_(False)
    model.policy = policy
    for layer in model.controller.layers:
        layer.get_parameter("out.weight").normal_()
    for block in model.network.blocks:  # what a controller reads is not of one scale
        block.get_parameter("attention_norm.weight").uniform_(0.5, 3.0)
    tokens = torch.randint(64, (2, 23))
    want = model(tokens)
    calls = []
    monkeypatch.setattr(own, "available", lambda hidden, layer: not calls.append(layer))
    got = model(tokens)
    assert len(calls) == 2 and want.route.unique().numel() == 3
    torch.testing.assert_close(got.concentration, want.concentration, rtol=2e-5, atol=1e-6)
    assert torch.equal(got.route, want.route)
    torch.testing.assert_close(got.logits, want.logits)
