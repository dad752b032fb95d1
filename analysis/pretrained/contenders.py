"""What a routed SmolLM2 is compared with: static choices of layers, one window for all.

What each costs, in keys and in ms.
"""

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.cost import executed_attention
from bayes_router.attention.experts.full import FullAttention
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.shapes import ExpertShape
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.calls.softmax import LocalExpert
from bayes_router.integrations.huggingface.language import Unforced
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.patch.cost import counted_experts
from bayes_router.routing.policy import at_price
from bayes_router.timing import isolated_ms
from bayes_router.training.dial import BudgetUnreachable, Dial
from bayes_router.types import Route

NEAR = 0.002  # a cost that lies below the budget by no more is met


def hybrid(fully: Collection[int], full: int, local: int) -> Route:
    """The route that puts the layers of `fully` on full attention and the others on local."""
    return lambda layer, hidden: full if layer in fully else local


def executed_cost(router: RoutedPretrained, routes: Tensor, start: int = 0) -> float:
    """What hard routes int64 [L, T, R] or [L, T] cost in attention, every token on `full` = 1.

    `executed_attention` at each position from `start` on: keys that are read, over all, so that
    routes which spend on late tokens are charged for it. Padding (-1) counts as the first expert.
    """
    routes = routes if routes.dim() == 3 else routes[..., None]
    taken = F.one_hot(routes.clamp_min(0), len(router.experts)).sum((0, 2)).cpu()  # [T, E]
    config = router.config
    return executed_attention(counted_experts(config), taken, config.kv_heads, 4, start=start)[
        "flops"
    ]


def share(context: int, window: int, sinks: int) -> float:
    """Cost of `local` relative to full over a window of `context` tokens."""
    shape = ExpertShape(1, 2, window + sinks)
    return LocalAttention(shape).flops_per_token(context) / FullAttention(shape).flops_per_token(
        context
    )


def layers_within(router: RoutedPretrained, context: int, budget: float) -> tuple[int, float]:
    """How many layers may stay on full within a budget, and what that costs."""
    num, local = len(router.layers), share(context, router.settings.window, router.settings.sinks)
    kept = max(0, min(num, math.floor(num * (budget - local) / (1 - local) + 1e-9)))
    return kept, (kept + (num - kept) * local) / num


def window_of(context: int, budget: float, sinks: int) -> int:
    """The widest window that costs at most `budget` everywhere."""
    low, high = 1, context
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share(context, middle, sinks) <= budget else (low, middle - 1)
    return low


@contextmanager
def windowed(router: RoutedPretrained, window: int) -> Iterator[None]:
    """Another window in every local expert."""
    experts = [e for e in router.layers.modules() if isinstance(e, LocalExpert)]
    before = [e.shape for e in experts]
    try:
        for expert in experts:
            expert.shape = expert.shape._replace(window=window)
        yield
    finally:
        for expert, shape in zip(experts, before, strict=True):
            expert.shape = shape


class Divergence:
    """Mean KL(original || routed) of a calibration text, for routes without controllers.

    Nats per token.
    """

    def __init__(self, router: RoutedPretrained, tokens: Tensor):
        self.router, self.tokens = router, tokens
        self.original = router.unrouted(tokens)[0]  # [T, V]

    @torch.no_grad()
    def __call__(self, route: Route) -> float:
        """Of one route."""
        logits, total = self.router.network(self.tokens, route)[0], 0.0
        for ours, theirs in zip(logits.split(2048), self.original.split(2048), strict=True):
            log, target = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
            total += float(F.kl_div(log, target, reduction="sum", log_target=True))
        return total / len(self.original)


def orders(router: RoutedPretrained, tokens: Tensor, seconds: float) -> dict[str, list[int]]:
    """Layers in the order in which they go to local, the harmless first.

    By name of how it was found.

    `one by one`: by the harm of each alone. `greedy`: the least harmful next, given those that went
    before; L (L + 1) / 2 passes, begun from `one by one` where `seconds` are over.
    """
    full, local = (router.experts.index(name) for name in ("full", "local"))
    harm, layers, started = (
        Divergence(router, tokens),
        list(range(len(router.layers))),
        time.perf_counter(),
    )

    def of(gone: Collection[int]) -> float:
        return harm(hybrid([layer for layer in layers if layer not in gone], full, local))

    alone = {layer: of([layer]) for layer in layers}
    single, greedy = sorted(layers, key=alone.__getitem__), []
    while len(greedy) < len(layers):
        left = [layer for layer in single if layer not in greedy]
        if time.perf_counter() - started > seconds:
            print(f"greedy order: stopped after {len(greedy)} of {len(layers)} layers", flush=True)
            greedy += left
            break
        greedy.append(min(left, key=lambda layer: of([*greedy, layer])))
    return {"one by one": single, "greedy": greedy}


@torch.no_grad()
def loads(
    router: RoutedPretrained, stream: TokenStream, context: int, limit: int, device: Any
) -> list[int]:
    """Layers by the share of tokens that the router leaves on full, the smallest first.

    Its own static choice.
    """
    full, shares = router.experts.index("full"), []
    for batch in stream.windows(context, 1, limit):
        shares.append(
            (router(batch.tokens.to(device), use_cache=False).route == full)
            .double()
            .mean((1, 2, 3))
        )
    order: list[int] = torch.stack(shares).mean(0).argsort().tolist()
    return order


def meet(
    router: RoutedPretrained, stream: TokenStream, budget: float, context: int, limit: int
) -> float:
    """Set the policy to a price at which executed routes cost about `budget`, and no more.

    Keys are counted; that cost is returned.
    """
    dial = Dial(
        Unforced(router),
        stream,
        lambda routes: executed_cost(router, routes.flatten(0, 1)),
        context=context,
        batch_size=1,
        limit=limit,
        policy=at_price("argmax", router.cost_ratio.tolist()),
        experts=router.experts,
    )
    with suppress(BudgetUnreachable):  # in a jump, the end below it
        dial.solve(budget - NEAR / 2, NEAR / 2)
    found = max(
        (one for one in dial.readings.values() if one.cost <= budget), key=lambda one: one.cost
    )
    router.policy = dial.policy(found.price)
    return found.cost


def isolated_median_ms(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall time of `run` in ms, the device drained before and after; two runs to warm up."""
    return statistics.median([isolated_ms(run, device)[1] for _ in range(repeats + 2)][2:])


@torch.no_grad()
def timings(
    router: RoutedPretrained, tokens: Tensor, route: Optional[Route], repeats: int
) -> dict[str, Any]:
    """Prefill of [1, T], and one decoding step behind it, ms.

    The model as it is used, by its own forward pass.
    """
    model, device = router.model, tokens.device
    with nullcontext() if route is None else router.routed_by(route):
        prefill = isolated_median_ms(
            lambda: model(tokens, use_cache=True, logits_to_keep=1), device, repeats
        )
        cache = model(tokens[:, :-8], use_cache=True, logits_to_keep=1).past_key_values
        decode = isolated_median_ms(
            lambda: model(tokens[:, -1:], past_key_values=cache, use_cache=True), device, repeats
        )
    return {"prefill_ms": prefill, "decode_ms": decode}
