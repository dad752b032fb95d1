"""What the layers of a patched model cost.

One that slides already pays for its own window alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_router.attention.cost import cost_ratios, read_ratios
from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.experts.gated import GatedLinearAttention
from bayes_router.attention.experts.linear import LinearAttention
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.shapes import ExpertShape
from bayes_router.checks import choose
from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.layer import EXPERTS
from bayes_router.integrations.calls.softmax import PatchedExpert
from bayes_router.routing.prior import ComputeAwarePrior
from bayes_router.transformer.build import build_experts
from bayes_router.types import CostModel


class _Mapped(Expert):
    """A patched expert with feature maps of its own, as the cost models ask experts.

    Counted, and timed as it is executed.
    """

    def __init__(self, shape: ExpertShape, kv_heads: int, inner: PatchedExpert):
        super().__init__(shape)
        self.kv_heads, self.inner = kv_heads, inner

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`."""
        k, v = k[:, : self.kv_heads], v[:, : self.kv_heads]  # a clock brings a key for every head
        out: Tensor = self.inner(AttentionCall(q, k, v, None, True, _no_kernel, q.shape[3] ** -0.5))
        return out

    def flops_per_token(self, context: int) -> float:
        """As without maps, and the map of a query for each head and of a key for each key head."""
        mapped = 2 * self.kv_heads * self.shape.head_dim**2
        return super().flops_per_token(context) + self.query_flops() + mapped

    def query_flops(self) -> float:
        """2 Dh^2 for each head."""
        return 2 * self.shape.num_heads * self.shape.head_dim**2


def _no_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    raise AssertionError("feature maps call no kernel of the layer's own")


class Mapped(_Mapped, LinearAttention):
    """`mapped` of a patch: linear attention with learned maps."""


class MappedGated(_Mapped, GatedLinearAttention):
    """`gated` of a patch: the same with gates."""


COUNTED: dict[str, type[_Mapped]] = {"mapped": Mapped, "gated": MappedGated}


def counted_experts(config: ModelConfig) -> list[Expert]:
    """What the experts of a patch cost.

    Those of `attention`, but where a patch has a mechanism of its own.
    """
    shape, experts = (
        ExpertShape(config.num_heads, config.head_dim, config.window),
        build_experts(config),
    )
    for index, name in enumerate(config.experts):
        if name in COUNTED:
            inner = EXPERTS[name](shape, config.kv_heads)
            experts[index] = COUNTED[name](shape, config.kv_heads, inner)
    return experts


def layer_costs(
    prior: PriorConfig, config: ModelConfig, context: int, windows: Sequence[int | None]
) -> tuple[Tensor, Tensor]:
    """Costs relative to attention over all keys = 1.

    Of the experts [E], and of the experts in each layer [L, E].

    In a layer whose own attention sees a window shorter than `context`, `full` is local attention
    of that window and costs what the prior's cost model says of that; `local` costs no more there.
    Ratios given by hand hold in every layer.
    """
    if prior.cost_ratio is not None:
        ratio = torch.tensor(prior.cost_ratio)
        return ratio, ratio.repeat(len(windows), 1)
    model = choose("prior.cost", prior.cost, CostModel)
    ratio, costs = cost_ratios(counted_experts(config), model, context), []
    for window in windows:
        cost = ratio.clone()
        if window is not None and window < context:
            own = LocalAttention(ExpertShape(config.num_heads, config.head_dim, window))
            full = config.experts.index("full")
            cost[full] = cost_ratios([own], model, context)[0].clamp_max(ratio[full])
            for index, name in enumerate(config.experts):
                if name == "local":
                    cost[index].clamp_max_(cost[full])
        costs.append(cost)
    return ratio, torch.stack(costs)


def layer_reads(config: ModelConfig, context: int, windows: Sequence[int | None]) -> Tensor:
    """Cached keys that a decoding step at `context` tokens reads, all = 1: [L, E].

    In each layer, under each expert.

    `full` reads the window of a layer that slides, `local` no more than that, an expert that keeps
    a state none.
    """
    ratio = read_ratios(counted_experts(config), context).float()
    own = torch.tensor(
        [1.0 if window is None else min(window / context, 1.0) for window in windows]
    )
    return torch.minimum(ratio, own[:, None])


def layer_prior(
    config: PriorConfig, cost_ratio: Tensor, layer_cost: Tensor, num_units: int
) -> ComputeAwarePrior:
    """The prior that the settings describe, without its price.

    It charges what each layer's experts cost there, but where the settings say what it charges.
    """
    config.check_shapes(len(layer_cost), len(cost_ratio), num_units)
    differ = not bool((layer_cost == cost_ratio).all())
    return ComputeAwarePrior(
        cost_ratio,
        len(layer_cost),
        config.layer_total_concentration or config.total_concentration,
        config.layer_temperature or config.temperature,
        config.map,
        config.layer_mean,
        layer_cost_ratio=config.layer_cost_ratio or (layer_cost if differ else None),
        layer_price_ratio=config.layer_price_ratio,
    )
