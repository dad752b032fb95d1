"""Which units are made static, read from a text, and what that costs.

Units that one expert takes, but for a share of the tokens; or the key heads that look far least,
as many as free so much of the cache.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.cost import cost_ratios
from bayes_router.attention.shapes import unit_heads
from bayes_router.checks import not_negative, require, whole
from bayes_router.data.stream import TokenStream
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.transformer.frozen import LIVE, Frozen, near_by_layer, short_by_layer
from bayes_router.transformer.nll import mean_nll
from bayes_router.types import CostModel, RoutingOutput

SHARE = 0.01
"""Of the tokens, where neither a share nor what to free is given."""


@dataclass(frozen=True)
class Layout:
    """Where a cache is freed, and how much a key head frees.

    Attributes:
        near: by layer, the experts that read no old key; none where no cache is freed.
        num_heads: query heads of a layer.
        kv_heads: its key heads.
        kept: keys that a freed head keeps.
        context: tokens behind which memory is counted.
    """

    near: Sequence[Collection[int]]
    num_heads: int
    kv_heads: int
    kept: int
    context: int

    @property
    def each(self) -> float:
        """Share of the cache that one key head frees."""
        return max(1 - self.kept / self.context, 0.0) / (len(self.near) * self.kv_heads)


def check_share(share: float) -> None:
    """ValueError where `share` is no share of the tokens below a half."""
    expected = "0 or more of the tokens, and less than half"
    require(not_negative("share", share, expected) < 0.5, "share", expected, share)


def decided(load: Tensor, share: float) -> Frozen:
    """Freeze the units of which all but `share` of the tokens take one expert.

    load [L, R, E] is the fraction on each.
    """
    most, expert = load.max(-1)
    chosen = torch.where(most >= 1 - share - 1e-9, expert, torch.full_like(expert, LIVE))
    return Frozen(tuple(tuple(map(int, row)) for row in chosen.tolist()))


def least_far(load: Tensor, free: float, layout: Layout) -> Frozen:
    """Freeze the key heads that look far least, as many as free the share `free` of the cache.

    What looks far is the share of the tokens, of each query head, on experts that read old keys;
    a key head's is the sum over its query heads. Each unit of one that is taken stands on the
    expert near by that most of its tokens take; no other unit is touched. load [L, R, E] is the
    fraction on each.
    """
    units = load.shape[1]
    # a unit may hold several key heads, or share one
    members: dict[tuple[int, int], list[int]] = {}
    for unit, (_, keys) in enumerate(unit_heads(units, layout.num_heads, layout.kv_heads)):
        members.setdefault((keys.start, keys.stop), []).append(unit)
    found = []
    for layer, near in enumerate(layout.near):
        for (first, end), mine in members.items() if near else ():
            far = 1 - load[layer, mine][:, list(near)].sum(-1)
            a_key_head = float(far.sum()) * (layout.num_heads // units) / (end - first)
            found.append((a_key_head, end - first, layer, mine))
    reach = layout.each * sum(size for _, size, _, _ in found)
    require(
        free <= reach + 1e-9,
        "free",
        f"a share of the cache of {layout.context} tokens up to {reach:.3f}",
        free,
        "free less, or count it behind a longer context",
    )
    rows, freed = [[LIVE] * units for _ in layout.near], 0.0
    for _, size, layer, mine in sorted(found, key=lambda one: one[0]):
        if freed >= free - 1e-9:
            break
        freed += size * layout.each
        near = list(layout.near[layer])
        for unit in mine:
            rows[layer][unit] = near[int(load[layer, unit, near].argmax())]
    return Frozen(tuple(map(tuple, rows)))


def choice(share: float | None, free: float | None, layout: Layout) -> Callable[[Tensor], Frozen]:
    """What is frozen by the load [L, R, E] of a text, by one of two rules.

    Raises:
        ValueError: both are given, or one is out of range.
    """
    if free is None:
        few = SHARE if share is None else share
        check_share(few)
        return lambda load: decided(load, few)
    require(share is None, "share", "none beside free, which is another rule", share)
    ok = isinstance(free, Real) and 0 < free < 1
    require(ok, "free", "a share of the cache between 0 and 1", free)
    return lambda load: least_far(load, free, layout)


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
        context: tokens of a window.
        bytes_before: of the cache behind one window, as it is held, before; 0: there is no cache.
        bytes: after.
        apart: what freezing costs in each window on which loss was read, nats per token.
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
    context: int = 0
    bytes_before: int = 0
    bytes: int = 0
    apart: tuple[float, ...] = ()

    def freed(self, context: int) -> float:
        """Share of the cache's bytes that are freed behind a text of so many tokens."""
        return self.short / self.key_heads * max(1 - self.kept / context, 0.0)

    def __str__(self) -> str:
        """One sentence."""
        error = "SE unknown of one window" if isnan(self.error) else f"SE {100 * self.error:.3f}"
        cache = (
            f"; cache of {self.context:,} tokens: {self.bytes_before:,} -> {self.bytes:,} bytes"
            if self.bytes_before
            else ""
        )
        return (
            f"{self.frozen} of {self.units} units frozen: {100 * self.lost:+.3f}% of perplexity "
            f"({error}, {self.tokens:,} tokens), cost {self.cost_before:.3f} -> {self.cost:.3f}; "
            f"{self.short} of {self.key_heads} key heads keep {self.kept} keys{cache}"
        )


@contextmanager
def choosing(owner: Any) -> Iterator[None]:
    """Thaw what is asked, so that its units are chosen anew; as before where that fails."""
    before, policy, owner.frozen = owner.frozen, owner.policy, None
    try:
        yield
    except BaseException:
        owner.frozen, owner.policy = before, policy
        raise


@torch.no_grad()
def freeze(
    owner: Any,
    windows: Sequence[Batch],
    choose: Callable[[Tensor], Frozen],
    ask: Callable[[Tensor], RoutingOutput],
    short: Callable[[Frozen, int], Sequence[int]],
    kept: int,
    key_heads: int,
    layer_cost: Tensor,
    held: Callable[[Tensor], int],
    spend: Callable[[int, float], None] | None = None,
) -> Freezing:
    """Set `owner.frozen` by the first half of `windows`, and read on the rest what that costs.

    Args:
        owner: what is asked, whose attribute `frozen` is set.
        windows: text that no fit has read.
        choose: what is frozen by the load [L, R, E] of a text, see `choice`.
        ask: the executed pass over tokens [B, T], under `owner.frozen`.
        short: the key heads of a layer that free their cache.
        kept: keys that these keep.
        key_heads: of a layer.
        layer_cost: of the experts in each layer, [L, E].
        held: bytes of a cache behind tokens [1, T], under `owner.frozen`; 0: there is none.
        spend: sets the price of `owner.policy` so that so many of the windows cost so much, units
            frozen; None: the price stays.
    """
    require(
        len(windows) >= 2, "texts", "two windows of text or more", len(windows), "lower context"
    )

    def read(batch: Batch) -> tuple[Tensor, Tensor]:
        """(nats per token [], load [L, R, E]) of a window, executed."""
        out = ask(batch.tokens)
        targets = batch.targets.to(out.logits.device)
        nll = mean_nll(out.logits, targets)
        load = F.one_hot(out.route, layer_cost.shape[-1]).double().mean((1, 2))
        return nll.double().cpu(), load.cpu()

    def cost(rows: Sequence[tuple[Tensor, Tensor]]) -> float:
        load = torch.stack([load for _, load in rows]).mean(0)
        return float((load * layer_cost.double()[:, None].cpu()).sum(-1).mean())

    half, one = len(windows) // 2, windows[0].tokens[:1]
    with choosing(owner):
        seen = [read(batch) for batch in windows[:half]]
        chosen = choose(torch.stack([load for _, load in seen]).mean(0))
        free, bytes_before = [read(batch) for batch in windows[half:]], held(one)
        owner.frozen = chosen
        if spend is not None:
            spend(half, cost(seen))
        static, bytes_after = [read(batch) for batch in windows[half:]], held(one)
    apart = torch.stack([b[0] - a[0] for a, b in zip(free, static, strict=True)])
    return Freezing(
        chosen.number,
        chosen.total,
        sum(len(short(chosen, layer)) for layer in range(len(chosen.experts))),
        key_heads * len(chosen.experts),
        kept,
        float(apart.mean().expm1()),
        float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else float("nan"),
        cost(free),
        cost(static),
        sum(batch.tokens.numel() for batch in windows[half:]),
        one.shape[1],
        bytes_before,
        bytes_after,
        tuple(apart.tolist()),
    )


def freeze_model(
    model: Any,
    tokens: Tensor | TokenSource,
    *,
    share: float | None = None,
    free: float | None = None,
    context: int | None = None,
    limit: int = 32_768,
) -> Freezing:
    """Make static what hardly moves: units that the policy sends to one expert, but for a share.

    Or, with `free`, the key heads that look far least, as many as free that share of the cache.

    Their controllers are not run any more; the policy and its price stay. A key head all of whose
    query heads are frozen on experts that never read its old keys (`local`, or one that keeps a
    state) keeps its window alone in the model's `new_cache`, which `generate` takes.

    Args:
        model: a `RoutedLanguageModel`.
        tokens: ids int64 [N], or a source, of text that the fit did not read.
        share: of the tokens, below a half; default 0.01.
        free: in place of it, the share of a cache's keys and values behind `context` tokens.
        context: tokens of a window; default four times the local window.
        limit: tokens that are read, half of them to choose the units.

    Returns:
        What was frozen, and what it costs in loss and keys.

    Raises:
        ValueError: less than two windows of text, or more to free than there is.
    """
    config, device = model.config, model.network.embed.weight.device
    context = 4 * config.window if context is None else context
    source = TokenStream(tokens, config.vocab_size) if isinstance(tokens, Tensor) else tokens
    kind = type(tokens).__name__
    require(hasattr(source, "windows"), "tokens", "ids, a tensor int64 [N], or a source", kind)
    whole("limit", limit), whole("context", context)
    windows = list(source.windows(context, 1, max(limit, 2 * context)))
    layout = Layout(near_by_layer(model), config.num_heads, config.kv_heads, config.window, context)
    costs = cost_ratios(model.counted_experts, CostModel.FLOPS, context)
    was_training = model.training
    model.eval()
    try:
        return freeze(
            model,
            windows,
            choice(share, free, layout),
            lambda ids: model(ids.to(device)),
            lambda chosen, layer: short_by_layer(model, chosen)[layer],
            config.window,
            config.kv_heads,
            costs.expand(config.num_layers, -1),
            lambda ids: model.new_cache(1, ids.shape[1]).bytes,
        )
    finally:
        model.train(was_training)
