"""What a whole model costs: FLOPs and bytes per token, projections, MLPs and head included."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_router.attention.cost import Cost, Mode, hard_bytes, hard_flops, own_flops, shares
from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.experts.full import FullAttention
from bayes_router.config import ModelConfig


class ModelCost(NamedTuple):
    """The cost of a whole model; `own` is of a token that takes the expert in every layer."""

    flops: Cost
    bytes: Cost


def model_cost(
    model: nn.Module,
    context: int,
    mode: Mode = Mode.PREFILL,
    *,
    batch: int = 1,
    last_only: bool = False,
    experts: Sequence[Expert] | None = None,
) -> ModelCost:
    """FLOPs and bytes per token of a `RoutedLanguageModel` or of its network alone.

    The network alone has no controllers.

    FLOPs: attention, every linear map and the tied head. Bytes: every weight once a pass, and
    attention's own; the residual stream is left out.

    Args:
        model: has a `ModelConfig` as `config`.
        context: tokens of a causal pass, or held in decoding, the new one included.
        mode: which pass.
        batch: sequences that share one reading of the weights.
        last_only: of a causal pass, logits of the last token alone.
        experts: count as if every layer had these; default its own.
    """
    config, made = _config(model), experts or model_experts(model)
    head = (
        config.vocab_size * config.d_model / (context if last_only and mode is Mode.PREFILL else 1)
    )
    maps = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    passed = batch * (context if mode is Mode.PREFILL else 1)
    weights = sum(p.nbytes for p in model.parameters()) / passed
    size = next(model.parameters()).element_size()
    layers = config.num_layers
    attention = hard_flops(made, context, config.kv_heads, mode)
    moved = hard_bytes(made, context, config.kv_heads, size, mode)
    return ModelCost(
        Cost(layers * attention.own, layers * attention.shared + 2 * (maps + head)),
        Cost(layers * moved.own, layers * moved.shared + weights),
    )


def model_experts(model: nn.Module) -> list[Expert]:
    """The experts of a layer."""
    return next(
        [e for e in part if isinstance(e, Expert)]
        for part in model.modules()
        if isinstance(part, nn.ModuleList) and len(part) and isinstance(part[0], Expert)
    )


def executed_model(
    model: nn.Module,
    taken: Tensor,
    mode: Mode = Mode.PREFILL,
    *,
    start: int = 0,
    batch: int = 1,
    last_only: bool = False,
    read: Tensor | None = None,
) -> dict[str, float]:
    """The whole of a `RoutedLanguageModel` by hard routes, `taken` [T, E] of all layers and units.

    Options as in `model_cost`.

    `read` as in `executed_attention`.

    `mflops` and `mbytes` are 10^6 a token; `flops` and `bytes` relate them to the leanest rival,
    the network alone with every token on full: no controller, no state.
    """
    experts, layers, context = model_experts(model), _config(model).num_layers, start + len(taken)
    full = [FullAttention(experts[0].shape)]
    own = model_cost(model, context, mode, batch=batch, last_only=last_only)
    rival = model_cost(
        model.get_submodule("network"),
        context,
        mode,
        batch=batch,
        last_only=last_only,
        experts=full,
    )
    flops = layers * own_flops(experts, taken, start) + own.flops.shared
    full_flops = layers * own_flops(full, taken.sum(1, keepdim=True), start) + rival.flops.shared
    moved, full_moved = (
        own.bytes.mean(shares(taken.sum(0) if read is None else read)),
        rival.bytes.mean(torch.ones(1)),
    )
    return {
        "flops": flops / full_flops,
        "bytes": moved / full_moved,
        "mflops": flops / 1e6,
        "mbytes": moved / 1e6,
    }


def _config(model: nn.Module) -> ModelConfig:
    config = model.config
    assert isinstance(config, ModelConfig)
    return config
