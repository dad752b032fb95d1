"""Which units of a patched language model nobody moves, read from a text.

And what making them static costs.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from bayes_router.data.tokens import TokenSource
from bayes_router.integrations.huggingface.freed_cache import Heads, cache_bytes
from bayes_router.integrations.huggingface.language import RoutedLanguage, Unforced
from bayes_router.routing.policy import Budget
from bayes_router.training.dial import BudgetUnreachable, Dial
from bayes_router.transformer import freezing
from bayes_router.transformer.freezing import Freezing, Layout, choice
from bayes_router.transformer.frozen import Frozen
from bayes_router.types import RoutingMode

SOFTMAX = {"full", "local"}
"""Experts that attend to each key head by itself: beside others a cache keeps every key."""


SAME = 5e-4
"""How far the executed cost may lie from what it was before units were frozen, full = 1."""


def near(router: RoutedLanguage, layer: int) -> list[int]:
    """The experts of a layer that read no old key; none where its cache cannot be freed."""
    softmax = set(router.experts) <= SOFTMAX and "local" in router.experts
    return [router.experts.index("local")] if softmax and router.found[layer].window is None else []


def short_heads(router: RoutedLanguage, chosen: Frozen, layer: int) -> Heads:
    """How the cache of a layer is kept under what is frozen."""
    one, settings, short = router.found[layer], router.settings, list[int]()
    if local := near(router, layer):
        short = chosen.short_heads(layer, local, one.shape.num_heads, one.kv_heads)
    whole = [head for head in range(one.kv_heads) if head not in short]
    return Heads(whole, short, settings.sinks, settings.window)


def freeze(
    router: RoutedLanguage,
    source: TokenSource,
    context: int,
    limit: int,
    share: float | None,
    free: float | None,
) -> Freezing:
    """Set `router.frozen` by the first half of a text; see `RoutedPretrained.freeze`."""
    windows = list(source.windows(context, 1, max(limit, 2 * context)))
    settings, shape = router.settings, router.found[0].shape
    kept = settings.sinks + settings.window - 1
    layout = Layout(
        [near(router, layer) for layer in range(len(router.layers))],
        shape.num_heads,
        router.config.kv_heads,
        kept,
        context,
    )
    return freezing.freeze(
        router,
        windows,
        choice(share, free, layout),
        lambda tokens: Unforced(router)(tokens.to(router.device), RoutingMode.HARD),
        lambda chosen, layer: short_heads(router, chosen, layer).short,
        kept,
        router.config.kv_heads,
        router.layer_cost,
        lambda tokens: _held(router, tokens),
        None if free is None else partial(spend, router, source, context),
    )


def spend(
    router: RoutedLanguage, source: TokenSource, context: int, windows: int, cost: float
) -> None:
    """Set the price of the policy so that the first `windows` of a text cost `cost`.

    Or as near to it as a price comes.

    A policy without a price stays.
    """
    policy = router.policy
    if not isinstance(policy, Budget):
        return
    dial = Dial(
        Unforced(router),
        source,
        router.layer_cost,
        context=context,
        batch_size=1,
        limit=windows * context,
        policy=lambda price: replace(policy, price=price),
        experts=router.experts,
    )
    try:
        price = dial.solve(cost, SAME).price
    except BudgetUnreachable as error:
        price = policy.price if error.nearest is None else error.nearest.price
    router.policy = replace(policy, price=price)


def _held(router: RoutedLanguage, tokens: Tensor) -> int:
    """Bytes of the model's own cache behind tokens [1, T]; 0: it has none of keys and values."""
    if not router.causal:
        return 0
    stack: Any = router.model.base_model  # nobody reads the logits
    with router.forced_to(None):
        out = stack(tokens.to(router.device), use_cache=True)
    cache = getattr(out, "past_key_values", None)
    return cache_bytes(cache) if hasattr(cache, "layers") else 0
