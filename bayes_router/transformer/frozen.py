"""Units that nobody moves: which they are, read from a text, and what making them static costs.

A static expert stands in place of a controller; key heads that never look far free their cache.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet
from torch.nn import functional as F

from bayes_router.attention.cost import cost_ratios
from bayes_router.attention.experts.contract import Kernel
from bayes_router.attention.shapes import unit_heads
from bayes_router.checks import not_negative, positive, require
from bayes_router.data.stream import TokenStream
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.routing.controller import MetaController
from bayes_router.transformer.nll import mean_nll
from bayes_router.types import CostModel, RoutingOutput

LIVE = -1
CERTAIN = 1e4
"""Concentration of a frozen unit's expert where a posterior is shown; the others have the floor."""


@dataclass(frozen=True)
class Frozen:
    """Which units of which layers have a static route.

    Attributes:
        experts: by layer and unit, an index into the patch's experts, or -1: the posterior decides.
    """

    experts: tuple[tuple[int, ...], ...]
    # by device, what passes read: [L, R], and of each layer the units that choose
    _there: dict[torch.device, tuple[Tensor, list[Tensor]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def at(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`experts` of a layer [R], and the units of it that still choose, kept on the device."""
        if device not in self._there:
            with torch.inference_mode(False):  # a fit may read what a pass without one left
                live = [torch.tensor(self.live(i)).long() for i in range(len(self.experts))]
                table = torch.tensor(self.experts).to(device)
                self._there[device] = table, [units.to(device) for units in live]
        table, units = self._there[device]
        return table[layer], units[layer]

    def live(self, layer: int) -> list[int]:
        """The units of a layer that still choose."""
        return [unit for unit, expert in enumerate(self.experts[layer]) if expert == LIVE]

    def fix(self, layer: int, executed: Tensor) -> Tensor:
        """Choices [.., R] or weights [.., R, E] of a layer with those of its frozen units."""
        static, _ = self.at(layer, executed.device)
        if not executed.is_floating_point():
            return torch.where(static != LIVE, static, executed)
        one_hot = F.one_hot(static.clamp_min(0), executed.shape[-1]).to(executed)
        return torch.where((static != LIVE)[:, None], one_hot, executed)

    def filled(
        self, layer: int, live: Tensor | None, like: Tensor, num: int, floor: float
    ) -> Tensor:
        """Concentrations [.., R, E].

        `live` [.., n, E] of those that choose, near certainty elsewhere.

        `like` [.., D] is what the controller read; `num` is E.
        """
        static, units = self.at(layer, like.device)
        sure = floor + CERTAIN * F.one_hot(static.clamp_min(0), num).to(like)  # [R, E]
        out = sure.expand(*like.shape[:-1], *sure.shape).clone()
        if live is not None:
            out.index_copy_(-2, units, live.to(out))
        return out

    def short_heads(
        self, layer: int, experts: Collection[int], num_heads: int, kv_heads: int
    ) -> list[int]:
        """The key heads of a layer all of whose query heads are frozen on one of `experts`."""
        units = self.experts[layer]
        free = set(range(kv_heads))
        for (_, keys), chosen in zip(
            unit_heads(len(units), num_heads, kv_heads), units, strict=True
        ):
            if chosen not in experts:
                free -= set(range(keys.start, keys.stop))
        return sorted(free)

    @property
    def number(self) -> int:
        """How many units are frozen."""
        return sum(expert != LIVE for layer in self.experts for expert in layer)

    @property
    def total(self) -> int:
        """How many units there are."""
        return sum(map(len, self.experts))


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


def read_frozen(saved: object, layers: int, units: int, experts: int) -> Frozen | None:
    """As a folder has it: lists of integers by layer; None where nothing is frozen.

    Raises:
        ValueError: it does not fit the patch.
    """
    if saved is None:
        return None
    rows = saved if isinstance(saved, Sequence) else ()
    fits = len(rows) == layers and all(
        isinstance(row, list)
        and len(row) == units
        and all(isinstance(e, int) and LIVE <= e < experts for e in row)
        for row in rows
    )
    require(fits, "frozen", f"{layers} lists of {units} experts, -1 to {experts - 1}", saved)
    return Frozen(tuple(map(tuple, rows)))


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


def posterior(
    controller: MetaController, frozen: Frozen | None, layer: int, hidden: Tensor, experts: int
) -> Dirichlet:
    """The posterior of a layer's routes; frozen units are not computed, and near certain."""
    if frozen is None:
        return controller.posterior(layer, hidden)
    _, live = frozen.at(layer, hidden.device)
    chosen = controller.posterior(layer, hidden, live).concentration if len(live) else None
    filled = frozen.filled(layer, chosen, hidden, experts, controller.floor)
    return Dirichlet(filled, validate_args=False)


def short_by_layer(model: Any, frozen: Frozen | None) -> list[list[int]]:
    """By layer of a routed language model, the key heads whose old keys nobody reads.

    Of layers where others' are kept: the rest have a cache as short as that already.
    """
    if frozen is None:
        return []
    found = []
    for layer, experts in enumerate(model.network.experts()):
        near = [i for i, e in enumerate(experts) if e.stateful or e.kernel is Kernel.LOCAL]
        sizes = model.config.num_heads, model.config.kv_heads
        every = len(near) == len(experts)
        found.append([] if every else frozen.short_heads(layer, near, *sizes))
    return found


@contextmanager
def choosing(owner: Any) -> Iterator[None]:
    """Thaw what is asked, so that its units are chosen anew; as before where that fails."""
    before, owner.frozen = owner.frozen, None
    try:
        yield
    except BaseException:
        owner.frozen = before
        raise


@torch.no_grad()
def freeze(
    owner: Any,
    windows: Sequence[Batch],
    share: float,
    ask: Callable[[Tensor], RoutingOutput],
    short: Callable[[Frozen, int], Sequence[int]],
    kept: int,
    key_heads: int,
    layer_cost: Tensor,
    held: Callable[[Tensor], int],
) -> Freezing:
    """Set `owner.frozen` by the first half of `windows`, and read on the rest what that costs.

    Args:
        owner: what is asked, whose attribute `frozen` is set.
        windows: text that no fit has read.
        share: of the tokens, see `decided`.
        ask: the executed pass over tokens [B, T], under `owner.frozen`.
        short: the key heads of a layer that free their cache.
        kept: keys that these keep.
        key_heads: of a layer.
        layer_cost: of the experts in each layer, [L, E].
        held: bytes of a cache behind tokens [1, T], under `owner.frozen`; 0: there is none.
    """
    check_share(share)
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
        load = torch.stack([read(batch)[1] for batch in windows[:half]]).mean(0)
        chosen = decided(load, share)
        free, bytes_before = [read(batch) for batch in windows[half:]], held(one)
        owner.frozen = chosen
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
    )


def freeze_model(
    model: Any,
    tokens: Tensor | TokenSource,
    *,
    share: float = 0.01,
    context: int | None = None,
    limit: int = 32_768,
) -> Freezing:
    """Make static what hardly moves: units that HARD sends to one expert, but for a share.

    Their controllers are not run any more. A key head all of whose query heads are frozen on
    experts that never read its old keys (`local`, or one that keeps a state) keeps its window
    alone in the model's `new_cache`, which `generate` takes.

    Args:
        model: a `RoutedLanguageModel`.
        tokens: ids int64 [N], or a source, of text that the fit did not read.
        share: of the tokens, below a half.
        context: tokens of a window; default four times the local window.
        limit: tokens that are read, half of them to choose the units.

    Returns:
        What was frozen, and what it costs in loss and keys.

    Raises:
        ValueError: less than two windows of text.
    """
    config, device = model.config, model.network.embed.weight.device
    context = 4 * config.window if context is None else context
    source = TokenStream(tokens, config.vocab_size) if isinstance(tokens, Tensor) else tokens
    kind = type(tokens).__name__
    require(hasattr(source, "windows"), "tokens", "ids, a tensor int64 [N], or a source", kind)
    positive("limit", limit)
    windows = list(source.windows(context, 1, max(limit, 2 * context)))
    costs = cost_ratios(model.counted_experts, CostModel.FLOPS, context)
    was_training = model.training
    model.eval()
    try:
        return freeze(
            model,
            windows,
            share,
            lambda ids: model(ids.to(device)),
            lambda chosen, layer: short_by_layer(model, chosen)[layer],
            config.window,
            config.kv_heads,
            costs.expand(config.num_layers, -1),
            lambda ids: model.new_cache(1, ids.shape[1]).bytes,
        )
    finally:
        model.train(was_training)
