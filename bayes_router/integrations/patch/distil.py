"""What a patch's linear experts learn before any route: the attention of their own layer."""

import torch
from torch import Tensor, nn

from bayes_router.attention.shapes import widen
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.layer import RoutedLayer
from bayes_router.integrations.calls.linear import LinearExpert
from bayes_router.integrations.patch.passes import Pass


def distillation_errors(layer: nn.Module, call: AttentionCall) -> list[Tensor]:
    """Mean |e(call) - full(call)|^2 / mean |full(call)|^2 of each linear expert e of a layer.

    Means are over real tokens, with gradients to the experts' parameters alone.
    """
    assert isinstance(layer, RoutedLayer)
    target = widen(layer.expert(layer.names.index("full"))(call))  # [B, H, T, Dv]
    tokens = Pass(real={0: call.real_queries()})

    def mean_square(x: Tensor) -> Tensor:
        return tokens.mean(0, x.square().transpose(1, 2))

    with torch.enable_grad():
        return [
            mean_square(widen(expert(call)) - target) / mean_square(target)
            for expert in layer.experts
            if isinstance(expert, LinearExpert)
        ]
