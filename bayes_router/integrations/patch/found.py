"""What a patch found in a model: its attention layers and their shapes."""

from dataclasses import dataclass

from torch import nn

from bayes_router.attention.shapes import ExpertShape
from bayes_router.checks import require
from bayes_router.config import ModelConfig
from bayes_router.integrations.patch.settings import RouterConfig


@dataclass(frozen=True)
class Found:
    """One attention layer of a model: the module that runs it, and its sizes."""

    module: nn.Module
    name: str
    shape: ExpertShape
    kv_heads: int
    width: int  # of the hidden state
    causal: bool
    window: int | None = None  # keys that the layer's own attention sees, where it slides


def model_config(
    found: Found, settings: RouterConfig, num_layers: int, vocab_size: int = 1
) -> ModelConfig:
    """The routed layers in the terms of the project: what costs, diagnostics and reports read."""
    heads, dim = found.shape.num_heads, found.shape.head_dim
    require(dim % 2 == 0, "head_dim", "an even number", dim, "models with odd heads are not served")
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=heads * dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=found.kv_heads,
        experts=settings.experts,
        route_by=settings.route_by,
        window=settings.window + settings.sinks,  # what `local` reads, hence what it costs
        controller_hidden=settings.controller_hidden,
        concentration_floor=settings.concentration_floor,
    )
