"""A user's file, strictly typed.

`mypy --config-file tests/typing/mypy.ini tests/typing/user.py` is clean. It is never run.
"""

from typing import assert_type

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_router import (
    Argmax,
    Expert,
    ModelConfig,
    PriorConfig,
    RoutedAttention,
    RoutedLanguageModel,
    RoutingGuide,
    RoutingModel,
    Sampling,
    build_prior,
    generate,
    load_patch,
    load_run,
    patch,
    register_expert,
    routed_attention,
)
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.torch_model import RoutedTorch


@register_expert("typed")
class Typed(Expert):
    """Its queries."""

    cost_ratio = 0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        return q


base = LlamaForCausalLM(LlamaConfig())
routed = patch(base, window=16, sinks=4, policy=Argmax())
assert_type(routed, RoutedPretrained)
assert_type(routed.set_budget(0.5, context=64), float)
assert_type(load_patch(base, "folder"), RoutedPretrained)
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1)
assert_type(patch(encoder, window=4), RoutedTorch)
assert_type(patch(nn.Sequential(base)), RoutedPretrained | RoutedTorch)
patch(base, windows=16)  # type: ignore[call-overload]
patch(base, window="16")  # type: ignore[call-overload]

config = ModelConfig(d_model=64)
tokens = torch.zeros(1, 3, dtype=torch.long)
lm = RoutedLanguageModel(config)
prior = build_prior(PriorConfig(), config, num_layers=2, context=64)
model = RoutingModel(lm.network, prior.concentration)
guide = RoutingGuide(model, lm.controller)
q = torch.ones(1, 1, 3, 4)
assert_type(routed_attention(q, q, q, 0, window=3, backend="torch"), Tensor)
new, routes = generate(lm, tokens, 3, Sampling(temperature=0.8))
layer = RoutedAttention(config)
settings, loaded = load_run("runs/tiny")
assert_type(loaded, RoutedLanguageModel)
