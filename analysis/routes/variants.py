"""What was tried beside the recipe.

Other cheap experts, and controllers that see more than their token's hidden state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet
from torch.nn import functional as F

from bayes_router.attention.experts.contract import Expert, register_expert
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.shapes import ExpertShape, repeat_heads
from bayes_router.config import ModelConfig
from bayes_router.routing.controller import LayerController, MetaController
from bayes_router.routing.posterior import posterior
from bayes_router.transformer.model import RoutedLanguageModel

SEGMENT = 8
KERNEL = 4


@register_expert("short_convolution")
class ShortConvolution(Expert):
    """out_t = sum_j w_j * v_{t-j} for j < 4, channel by channel: no queries, no keys."""

    cost_ratio = 0.05

    def __init__(self, shape: ExpertShape):
        super().__init__(shape)
        weight = torch.zeros(shape.num_heads * shape.head_dim, 1, KERNEL)
        weight[..., -1] = 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        v = repeat_heads(v, q.shape[1])
        flat = F.pad(v.transpose(2, 3).flatten(1, 2), (KERNEL - 1, 0))  # [B, H Dh, 3 + Tk]
        out = F.conv1d(flat, self.weight.to(v.dtype), groups=len(self.weight))
        return out.unflatten(1, (v.shape[1], -1)).transpose(2, 3)[:, :, -q.shape[2] :]

    def flops_per_token(self, context: int) -> float:
        """Multiply-adds counted as two."""
        return 2 * KERNEL * self.shape.num_heads * self.shape.head_dim


WINDOWS = (256, 512, 1024)
"""Of heads that look farther than `local` and not everywhere: the experts `window_512`, ..."""


class _Window(Expert):
    """Sliding-window attention of a width of its own, whatever `model.window` says."""

    cost_ratio = LocalAttention.cost_ratio
    width: int

    def __init__(self, shape: ExpertShape):
        super().__init__(shape)
        self.inner = LocalAttention(shape._replace(window=self.width))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        out: Tensor = self.inner(q, k, v)
        return out

    def flops_per_token(self, context: int) -> float:
        """As `local` of this width."""
        return self.inner.flops_per_token(context)

    def keys_read(self, context: int) -> int:
        """As `local` of this width."""
        return self.inner.keys_read(context)


for _width in WINDOWS:
    register_expert(f"window_{_width}")(type(f"Window{_width}", (_Window,), {"width": _width}))


class ConvolvedController(LayerController):
    """Reads the hidden states of the last four tokens.

    Through a causal convolution channel by channel.
    """

    def __init__(self, d_model: int, num_experts: int, hidden: int):
        super().__init__(d_model, num_experts, hidden)
        self.convolution = nn.Conv1d(d_model, d_model, KERNEL, groups=d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, 1, E]."""
        past = F.pad(hidden.mT, (KERNEL - 1, 0))
        return super().forward(hidden + self.convolution(past).mT)


class SegmentController(LayerController):
    """Decides once for a segment of eight tokens, by the first of them."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, 1, E]."""
        first = hidden[:, ::SEGMENT].repeat_interleave(SEGMENT, 1)[:, : hidden.shape[1]]
        return super().forward(first)


class ConstantController(LayerController):
    """Decides once for all tokens: a static choice of each unit, fitted as a router is.

    It reads ones, as large as a normalised hidden state: reading zeros only its biases would move,
    and those too slowly to leave the layout that it starts on.
    """

    def forward(self, hidden: Tensor, units: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, R, E], whatever the hidden states."""
        return super().forward(torch.ones_like(hidden), units)


class ChainedController(MetaController):
    """Every layer's controller sees the posterior mean of the layer below too.

    The first sees zeros.
    """

    def __init__(self, config: ModelConfig):
        experts = len(config.experts)
        super().__init__(
            config.d_model + experts, config.num_layers, experts, config.controller_hidden
        )
        self._below: Tensor | None = None

    def posterior(self, layer: int, hidden: Tensor) -> Dirichlet:
        """See `MetaController.posterior`."""
        if layer == 0 or self._below is None:
            self._below = hidden.new_zeros(*hidden.shape[:-1], self.layers[0].out.out_features)
        q = posterior(
            self.layers[layer](torch.cat([hidden, self._below.to(hidden.dtype)], -1)), self.floor
        )
        self._below = q.mean.flatten(-2)  # [B, T, E]: these controllers route by layer
        return q


def _with_layers(
    make: Callable[[int, int, int], LayerController],
) -> Callable[[ModelConfig], MetaController]:
    def build(config: ModelConfig) -> MetaController:
        size = config.d_model, len(config.experts), config.controller_hidden
        controller = MetaController(
            size[0], config.num_layers, *size[1:], config.concentration_floor
        )
        controller.layers = nn.ModuleList(make(*size) for _ in range(config.num_layers))
        return controller

    return build


def _constant(config: ModelConfig) -> MetaController:
    size = config.d_model, len(config.experts), config.controller_hidden, config.num_units
    controller = MetaController(
        size[0], config.num_layers, *size[1:3], config.concentration_floor, config.num_units
    )
    controller.layers = nn.ModuleList(ConstantController(*size) for _ in range(config.num_layers))
    return controller


CONTROLLERS: dict[str, Callable[[ModelConfig], Any]] = {
    "convolved": _with_layers(ConvolvedController),
    "segments": _with_layers(SegmentController),
    "chained": ChainedController,
    "constant": _constant,
}


def with_controller(config: ModelConfig, name: str) -> RoutedLanguageModel:
    """A routed language model whose controller is the one called `name`."""
    model = RoutedLanguageModel(config)
    model.controller = CONTROLLERS[name](config)
    return model
