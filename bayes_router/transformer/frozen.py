"""Units with a static route: an expert stands in place of their controller.

Key heads that never look far free their cache.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet
from torch.nn import functional as F

from bayes_router.attention.experts.contract import Kernel
from bayes_router.attention.shapes import unit_heads
from bayes_router.checks import require
from bayes_router.routing.controller import MetaController

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
    sizes = model.config.num_heads, model.config.kv_heads
    return [
        frozen.short_heads(layer, near, *sizes) if near else []
        for layer, near in enumerate(near_by_layer(model))
    ]


def near_by_layer(model: Any) -> list[list[int]]:
    """By layer of a routed language model, the experts that read no old key.

    None where every expert is such a one: that cache is short already.
    """
    found = []
    for experts in model.network.experts():
        near = [i for i, e in enumerate(experts) if e.stateful or e.kernel is Kernel.LOCAL]
        found.append([] if len(near) == len(experts) else near)
    return found
