"""Routed attention: shared queries, keys, values and output projection.

Every token takes its own mixture of experts.
"""

import torch
from torch import Tensor, nn

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.shapes import by_head, merge_tokens, with_units
from bayes_router.checks import require
from bayes_router.config import ModelConfig
from bayes_router.transformer.build import build_experts
from bayes_router.transformer.padding import real_tokens
from bayes_router.transformer.rotary import rotary_angles, rotate

Angles = tuple[Tensor, Tensor]


class AttentionMixture(nn.Module):
    """W_o sum_e route_e Expert_e(q, k, v) with one projection to q, k, v for all experts.

    The route is given.

    Deterministic: no controller, no prior. `Expert.rotary` says which experts see rotary positions.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        require(isinstance(config, ModelConfig), "config", "a ModelConfig", type(config).__name__)
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
            route: weights [B, T, R, E] (every expert computed), choices int64 [B, T, R] (only the
                chosen ones), or one expert; R routing units of H / R neighbouring query heads.
                Without its dimension R a route holds for all heads.
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
            angles = rotary_angles(
                torch.arange(T, device=x.device), config.head_dim, config.rope_base
            )
        heads = self.qkv(x).view(B, T, -1, config.head_dim).transpose(1, 2)  # [B, H + 2 Hkv, T, Dh]
        both = self.head_sizes[:2]  # queries and keys are turned together: half the launches
        plain, v = heads.split((sum(both), both[1]), 1)
        plain_q, plain_k = plain.split(both, 1)
        q, k = rotate(plain, angles).split(both, 1)
        if cache is not None:
            mixed = cache.attend(
                q, k, v, route, linear_q=plain_q, linear_k=plain_k, lengths=lengths
            )
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

    def _soft(
        self, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor, route: Tensor
    ) -> Tensor:
        weights, mixed = with_units(route).to(q.dtype).unbind(-1), torch.zeros_like(q)
        for weight, expert in zip(weights, self.experts, strict=True):
            assert isinstance(expert, Expert)
            mixed = mixed + by_head(weight, q.shape[1]) * (
                expert(q, k, v) if expert.rotary else expert(plain_q, plain_k, v)
            )
        return mixed
