"""The standalone routed layer, for a plain PyTorch loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from bayes_router.checks import choose, require
from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.routing.controller import LayerController
from bayes_router.routing.policy import Argmax, Policy, execute
from bayes_router.routing.posterior import posterior
from bayes_router.routing.statistics import RoutingStatistics, routing_statistics
from bayes_router.routing.tilt import tilted_kl, tilted_moments
from bayes_router.transformer.build import build_prior
from bayes_router.transformer.layer import AttentionMixture
from bayes_router.types import RoutingMode


@dataclass(frozen=True)
class RoutedAttentionOutput:
    """What the standalone layer returns."""

    output: Tensor  # [B, T, D]
    # [], KL(posterior || prior), the price of the prior included; nats per token, summed over units
    kl: Tensor
    concentration: Tensor  # [B, T, R, E]
    route: Tensor  # as executed: [B, T, R, E] or int64 [B, T, R]
    statistics: RoutingStatistics


class RoutedAttention(nn.Module):
    """The standalone layer: attention routed by its own posterior, for a plain PyTorch loop.

    loss = task_loss + kl_weight * layer(x).kl is the negative ELBO of this layer's routes, with x
    [B, T, D] normalised. Training mode draws routes (SAMPLE), evaluation mode executes them (HARD);
    `mode` overrides.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        prior: PriorConfig | None = None,
        policy: Policy | None = None,
    ):
        super().__init__()
        self.config = config or ModelConfig()
        self.attention = AttentionMixture(self.config)
        sizes = (
            self.config.d_model,
            len(self.config.experts),
            self.config.controller_hidden,
            self.config.num_units,
        )
        self.controller = LayerController(*sizes)
        self.policy = policy or Argmax()
        prior_ = build_prior(prior or PriorConfig(), self.config, num_layers=1, context=1024)
        self.register_buffer("prior_concentration", prior_.concentration[0])  # [E], or [R, E]
        self.register_buffer("cost_ratio", prior_.cost_ratio)
        tilt = prior_.tilt if prior_.tilt.dim() == 1 else prior_.tilt[0]
        log_normaliser = tilted_moments(prior_.concentration[0], tilt).log_normaliser.float()
        self.register_buffer("tilt", tilt, persistent=False)
        self.register_buffer("log_normaliser", log_normaliser, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """See `nn.Module._apply`: prior and costs stay as precise as they are."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            if moved.dtype.itemsize < buffer.dtype.itemsize:
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, x: Tensor, mode: RoutingMode | str | None = None) -> RoutedAttentionOutput:
        """Route and attend; x [B, T, D] normalised."""
        require(
            x.dim() == 3 and x.shape[-1] == self.config.d_model,
            "x",
            f"shape [B, T, {self.config.d_model}]",
            tuple(x.shape),
        )
        default = RoutingMode.SAMPLE if self.training else RoutingMode.HARD
        chosen = default if mode is None else choose("mode", mode, RoutingMode)
        q = posterior(self.controller(x), self.config.concentration_floor)
        route = execute(q, chosen, self.policy)
        concentration, prior = q.concentration, self.get_buffer("prior_concentration")
        cost_ratio = self.get_buffer("cost_ratio")
        statistics = routing_statistics(
            concentration.detach(), route.detach(), cost_ratio, self.config.experts
        )
        of_units = tilted_kl(
            concentration, prior, self.get_buffer("tilt"), self.get_buffer("log_normaliser")
        )
        kl = of_units.mean((0, 1)).sum()
        return RoutedAttentionOutput(self.attention(x, route), kl, concentration, route, statistics)
