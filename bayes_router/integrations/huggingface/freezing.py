"""Which units of a patched language model nobody moves, read from a text.

And what making them static costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.checks import require
from bayes_router.data.tokens import Batch
from bayes_router.integrations.huggingface.freed_cache import Heads
from bayes_router.integrations.huggingface.language import RoutedLanguage, Unforced
from bayes_router.integrations.patch.freezing import Frozen, decided
from bayes_router.types import RoutingMode

SOFTMAX = {"full", "local"}
"""Experts that attend to each key head by itself: beside others a cache keeps every key."""


@dataclass(frozen=True)
class Freezing:
    """What `freeze` found.

    Units are chosen on one half of the text, loss and cost are read on the other.

    Attributes:
        frozen: units whose route is static now.
        units: all of them, over layers.
        short: key heads that keep sinks and window alone.
        key_heads: all of them, over layers.
        kept: keys that a short head keeps, sinks + window - 1.
        lost: share of perplexity that freezing costs, exp(mean difference in nats) - 1.
        error: standard error of that mean, over windows.
        cost_before: executed cost of attention before, full = 1.
        cost: after.
        tokens: on which loss and cost were read.
    """

    frozen: int
    units: int
    short: int
    key_heads: int
    kept: int
    lost: float
    error: float
    cost_before: float
    cost: float
    tokens: int

    def freed(self, context: int) -> float:
        """Share of the cache's bytes that are freed behind a text of so many tokens."""
        return self.short / self.key_heads * max(1 - self.kept / context, 0.0)

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"{self.frozen} of {self.units} units frozen: {100 * self.lost:+.3f}% of perplexity "
            f"(SE {100 * self.error:.3f}, {self.tokens:,} tokens), cost {self.cost_before:.3f} -> "
            f"{self.cost:.3f}; {self.short} of {self.key_heads} key heads keep {self.kept} keys"
        )


def short_heads(router: RoutedLanguage, frozen: Frozen, layer: int) -> Heads:
    """How the cache of a layer is kept under `frozen`."""
    one, settings = router.found[layer], router.settings
    short: list[int] = []
    if set(router.experts) <= SOFTMAX and "local" in router.experts and one.window is None:
        local, heads = router.experts.index("local"), one.shape.num_heads
        short = frozen.short_heads(layer, local, heads, one.kv_heads)
    whole = [head for head in range(one.kv_heads) if head not in short]
    return Heads(whole, short, settings.sinks, settings.window)


@torch.no_grad()
def freeze(router: RoutedLanguage, windows: Sequence[Batch], share: float) -> Freezing:
    """Set `router.frozen` by the first half of `windows`; see `RoutedPretrained.freeze`."""
    require(
        len(windows) >= 2, "texts", "two windows of text or more", len(windows), "lower context"
    )
    half = len(windows) // 2
    before, router.frozen = router.frozen, None
    try:
        load = torch.stack([_read(router, batch)[1] for batch in windows[:half]]).mean(0)
        chosen = decided(load, share)
        free = [_read(router, batch) for batch in windows[half:]]
    except BaseException:
        router.frozen = before
        raise
    router.frozen = chosen
    static = [_read(router, batch) for batch in windows[half:]]
    apart = torch.stack([b[0] - a[0] for a, b in zip(free, static, strict=True)])
    kept = [short_heads(router, chosen, layer) for layer in range(len(router.layers))]
    short = sum(len(heads.short) for heads in kept)
    return Freezing(
        chosen.number,
        sum(map(len, chosen.experts)),
        short,
        short + sum(len(heads.whole) for heads in kept),
        router.settings.sinks + router.settings.window - 1,
        float(apart.mean().expm1()),
        float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else float("nan"),
        _cost(router, free),
        _cost(router, static),
        sum(batch.tokens.numel() for batch in windows[half:]),
    )


def _read(router: RoutedLanguage, batch: Batch) -> tuple[Tensor, Tensor]:
    """(nats per token [], load [L, R, E]) of a window, executed."""
    tokens, targets = batch.tokens.to(router.device), batch.targets.to(router.device)
    out = Unforced(router)(tokens, RoutingMode.HARD)
    nll = F.cross_entropy(out.logits.float().flatten(0, 1), targets.flatten())
    load = F.one_hot(out.route, len(router.experts)).double().mean((1, 2))
    return nll.double().cpu(), load.cpu()


def _cost(router: RoutedLanguage, rows: Sequence[tuple[Tensor, Tensor]]) -> float:
    load = torch.stack([load for _, load in rows]).mean(0)
    return float((load * router.layer_cost.double()[:, None]).sum(-1).mean())
