"""Which units of a patched language model nobody moves, read from a text.

And what making them static costs.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bayes_router.data.tokens import Batch
from bayes_router.integrations.huggingface.freed_cache import Heads, cache_bytes
from bayes_router.integrations.huggingface.language import RoutedLanguage, Unforced
from bayes_router.transformer import frozen
from bayes_router.transformer.frozen import Freezing, Frozen
from bayes_router.types import RoutingMode

SOFTMAX = {"full", "local"}
"""Experts that attend to each key head by itself: beside others a cache keeps every key."""


def short_heads(router: RoutedLanguage, chosen: Frozen, layer: int) -> Heads:
    """How the cache of a layer is kept under what is frozen."""
    one, settings = router.found[layer], router.settings
    short: list[int] = []
    if set(router.experts) <= SOFTMAX and "local" in router.experts and one.window is None:
        local, heads = router.experts.index("local"), one.shape.num_heads
        short = chosen.short_heads(layer, (local,), heads, one.kv_heads)
    whole = [head for head in range(one.kv_heads) if head not in short]
    return Heads(whole, short, settings.sinks, settings.window)


def freeze(router: RoutedLanguage, windows: Sequence[Batch], share: float) -> Freezing:
    """Set `router.frozen` by the first half of `windows`; see `RoutedPretrained.freeze`."""
    settings = router.settings
    return frozen.freeze(
        router,
        windows,
        share,
        lambda tokens: Unforced(router)(tokens.to(router.device), RoutingMode.HARD),
        lambda chosen, layer: short_heads(router, chosen, layer).short,
        settings.sinks + settings.window - 1,
        router.config.kv_heads,
        router.layer_cost,
        lambda tokens: _held(router, tokens),
    )


def _held(router: RoutedLanguage, tokens: Tensor) -> int:
    """Bytes of the model's own cache behind tokens [1, T]; 0: it has none of keys and values."""
    if not router.causal:
        return 0
    stack: Any = router.model.base_model  # nobody reads the logits
    with router.forced_to(None):
        out = stack(tokens.to(router.device), use_cache=True)
    cache = getattr(out, "past_key_values", None)
    return cache_bytes(cache) if hasattr(cache, "layers") else 0
