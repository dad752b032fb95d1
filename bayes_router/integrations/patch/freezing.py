"""Units that nobody moves.

A static expert in place of a controller, and the key heads whose cache that frees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.shapes import unit_heads
from bayes_router.checks import require

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

    def short_heads(self, layer: int, expert: int, num_heads: int, kv_heads: int) -> list[int]:
        """The key heads of a layer all of whose query heads are frozen on `expert`."""
        units = self.experts[layer]
        free = set(range(kv_heads))
        for (_, keys), chosen in zip(
            unit_heads(len(units), num_heads, kv_heads), units, strict=True
        ):
            if chosen != expert:
                free -= set(range(keys.start, keys.stop))
        return sorted(free)

    @property
    def number(self) -> int:
        """How many units are frozen."""
        return sum(expert != LIVE for layer in self.experts for expert in layer)


def decided(load: Tensor, share: float) -> Frozen:
    """Freeze the units of which all but `share` of the tokens take one expert.

    load [L, R, E] is the fraction on each.
    """
    require(0 <= share < 0.5, "share", "0 or more of the tokens, and less than half", share)
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
