"""Routed attention: shared queries, keys, values and output projection; every token takes its own mixture of experts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayes_router.attention.cost import cost_ratios
from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.shapes import ExpertShape, merge_tokens
from bayes_router.checks import choose, require
from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.presets import preset
from bayes_router.routing.controller import LayerController
from bayes_router.routing.policy import Argmax, Policy, execute
from bayes_router.routing.posterior import (
    categorical_entropy,
    dirichlet_kl,
    expected_entropy,
    posterior,
    posterior_mean,
    route_information,
)
from bayes_router.routing.prior import ComputeAwarePrior
from bayes_router.transformer.rotary import rotary_angles, rotate
from bayes_router.types import CostModel, RoutingMode

Angles = tuple[Tensor, Tensor]


def build_experts(config: ModelConfig) -> list[Expert]:
    """The experts that a configuration names, in its order."""
    shape = ExpertShape(config.num_heads, config.head_dim, config.window)
    return [expert_class(name)(shape) for name in config.experts]


def real_tokens(lengths: Tensor, T: int) -> Tensor:
    """[B, T] bool, False on the right padding of rows of `lengths` [B]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


class AttentionMixture(nn.Module):
    """W_o sum_e route_e Expert_e(q, k, v) with one projection to q, k, v for all experts; the route is given.

    Deterministic: no controller, no prior. `Expert.rotary` says which experts see rotary positions.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.head_sizes = (config.num_heads, config.kv_heads, config.kv_heads)
        self.qkv = nn.Linear(config.d_model, sum(self.head_sizes) * config.head_dim, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.experts = nn.ModuleList(build_experts(config))

    def forward(
        self,
        x: Tensor,
        route: Tensor | int,
        angles: Angles | None = None,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, T, D], normalised.
            route: weights [B, T, E] (every expert computed), choices int64 [B, T] (only the chosen ones), or one expert.
            angles: rotary angles of the tokens; positions 0 .. T - 1 by default.
            cache: what came before, of this layer's own experts; the tokens are added to it.
            lengths: [B] real tokens of each row; the rest is right padding and comes out as zero.

        Returns:
            [B, T, D]
        """
        B, T, _ = x.shape
        config = self.config
        if cache is not None:
            cache.check_owner(self.experts)
        if angles is None:
            angles = rotary_angles(torch.arange(T, device=x.device), config.head_dim, config.rope_base)
        heads = self.qkv(x).view(B, T, -1, config.head_dim).transpose(1, 2)  # [B, H + 2 Hkv, T, Dh]
        plain_q, plain_k, v = heads.split(self.head_sizes, 1)
        q, k = rotate(plain_q, angles), rotate(plain_k, angles)
        if cache is not None:
            mixed = cache.attend(q, k, v, route, linear_q=plain_q, linear_k=plain_k, lengths=lengths)
        elif isinstance(route, Tensor) and route.is_floating_point():
            mixed = self._soft(q, k, v, plain_q, plain_k, route)
            if lengths is not None:
                mixed = torch.where(real_tokens(lengths, T)[:, None, :, None], mixed, 0.0)
        else:
            mixed = routed_attention(
                q,
                k,
                v,
                route,
                window=config.window,
                linear_q=plain_q,
                linear_k=plain_k,
                lengths=lengths,
                experts=[e for e in self.experts if isinstance(e, Expert)],
            )
        return self.out(merge_tokens(mixed))

    def _soft(self, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor, route: Tensor) -> Tensor:
        weights = route.to(q.dtype).permute(2, 0, 1)[:, :, None, :, None]  # [E, B, 1, T, 1]
        mixed = torch.zeros_like(q)
        for weight, expert in zip(weights, self.experts, strict=True):
            assert isinstance(expert, Expert)
            mixed = mixed + weight * (expert(q, k, v) if expert.rotary else expert(plain_q, plain_k, v))
        return mixed


@dataclass(frozen=True)
class RoutingStatistics:
    """How one layer routed one batch; entropies and information in nats, costs relative to full attention."""

    experts: tuple[str, ...]
    load: tuple[float, ...]  # share of the tokens on each expert (soft weights: mean weight)
    cost: float  # cost ratio of the executed route
    entropy_of_mean: float  # mean over tokens
    expected_entropy: float  # mean over tokens
    route_information: float  # between token and route
    total_concentration: float  # mean over tokens
    collapse: str  # "none", "routing" (nearly all tokens on one expert) or "posterior" (one route for all tokens)

    def __repr__(self) -> str:
        load = ", ".join(f"{name} {share:.1%}" for name, share in zip(self.experts, self.load, strict=True))
        return (
            f"RoutingStatistics(load: {load}; cost {self.cost:.3f}; information {self.route_information:.3f} nats; "
            f"entropy {self.entropy_of_mean:.3f}; collapse: {self.collapse})"
        )


@dataclass(frozen=True)
class RoutedAttentionOutput:
    """What the standalone layer returns."""

    output: Tensor  # [B, T, D]
    kl: Tensor  # [], KL(posterior || prior), nats per token
    concentration: Tensor  # [B, T, E]
    route: Tensor  # as executed: [B, T, E] or int64 [B, T]
    statistics: RoutingStatistics


ROUTING_COLLAPSE_LOAD = 0.99
POSTERIOR_COLLAPSE_INFORMATION = 1e-3


class RoutedAttention(nn.Module):
    """The standalone layer: attention routed by its own posterior, for a plain PyTorch loop.

    loss = task_loss + kl_weight * layer(x).kl is the negative ELBO of this layer's routes, with x [B, T, D] normalised.
    Training mode draws routes (SAMPLE), evaluation mode executes them (HARD); `mode` overrides.
    """

    def __init__(self, config: ModelConfig | None = None, prior: PriorConfig | None = None, policy: Policy | None = None):
        super().__init__()
        self.config = config or ModelConfig()
        self.attention = AttentionMixture(self.config)
        self.controller = LayerController(self.config.d_model, len(self.config.experts), self.config.controller_hidden)
        self.policy = policy or Argmax()
        prior_ = build_prior(prior or PriorConfig(), self.config, num_layers=1, context=1024)
        self.register_buffer("prior_concentration", prior_.concentration[0])
        self.register_buffer("cost_ratio", prior_.cost_ratio)

    @classmethod
    def from_preset(cls, name: str) -> "RoutedAttention":
        """A layer of the size of a preset: tiny (d_model 128), small (256), base (512)."""
        return cls(preset(name).model)

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
        statistics = routing_statistics(concentration.detach(), route.detach(), cost_ratio, self.config.experts)
        return RoutedAttentionOutput(
            self.attention(x, route), dirichlet_kl(concentration, prior).mean(), concentration, route, statistics
        )


def routing_statistics(concentration: Tensor, route: Tensor, cost_ratio: Tensor, experts: Sequence[str]) -> RoutingStatistics:
    """Summarise one layer's posteriors [B, T, E] and executed routes ([B, T, E] or int64 [B, T])."""
    num_experts = len(experts)
    concentration = concentration.reshape(-1, num_experts)
    weights = route if route.is_floating_point() else nn.functional.one_hot(route, num_experts)
    load = weights.reshape(-1, num_experts).float().mean(0)
    mean = posterior_mean(concentration)
    information = float(route_information(mean))
    collapse = "none"
    if num_experts > 1 and float(load.max()) > ROUTING_COLLAPSE_LOAD:
        collapse = "routing"
    elif num_experts > 1 and information < POSTERIOR_COLLAPSE_INFORMATION:
        collapse = "posterior"
    return RoutingStatistics(
        experts=tuple(experts),
        load=tuple(map(float, load)),
        cost=float(load @ cost_ratio),
        entropy_of_mean=float(categorical_entropy(mean).mean()),
        expected_entropy=float(expected_entropy(concentration).mean()),
        route_information=information,
        total_concentration=float(concentration.sum(-1).mean()),
        collapse=collapse,
    )


def build_prior(prior: PriorConfig, model: ModelConfig, num_layers: int, context: int) -> ComputeAwarePrior:
    """The prior that the settings describe; FLOPs and latency are those at `context` tokens."""
    ratios = (
        torch.tensor(prior.cost_ratio)
        if prior.cost_ratio is not None
        else cost_ratios(build_experts(model), choose("prior.cost", prior.cost, CostModel), context)
    )
    return ComputeAwarePrior(
        ratios,
        num_layers,
        prior.layer_total_concentration or prior.total_concentration,
        prior.layer_temperature or prior.temperature,
        prior.map,
        prior.layer_mean,
    )
