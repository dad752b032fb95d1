"""Keys and values of one layer at each row's own positions, in slots or in a ring."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert, Kernel
from bayes_router.attention.hard.problem import RoutedProblem


class KeyStore:
    """What the experts of a layer look up: no token is stored twice.

    Attributes:
        lengths: [B] int64, tokens held of each row.
        keys: [B, Hkv, S + 1, Dh], rotated; slot S takes what padding would write. S is the
            capacity, or the widest window where no expert looks further (then a ring: position p is
            in slot p mod S). None where all experts keep a state.
        values: as keys.
        plain_keys: as keys, without rotary positions; kept only for an expert that wants them and
            keeps no state.
        longest: an upper bound of lengths that the host knows.
    """

    def __init__(self, experts: Sequence[Expert], capacity: int, like: Tensor):
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1 token; got {capacity}")
        self.capacity = capacity
        stored = [e for e in experts if not e.stateful]
        wide = max((e.shape.window for e in stored if e.kernel is Kernel.LOCAL), default=0)
        near = bool(stored) and all(e.kernel is Kernel.LOCAL for e in stored)
        self.slots = min(capacity, wide) if near else capacity if stored else 0
        self.ring = near and self.slots < capacity

        def store(wanted: bool) -> Tensor | None:
            batch, heads, _, dim = like.shape
            return like.new_zeros(batch, heads, self.slots + 1, dim) if wanted else None

        self.keys = store(any(e.rotary for e in stored))
        self.plain_keys = store(any(not e.rotary for e in stored))
        self.values = store(bool(stored))
        self.lengths = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
        self.longest = 0

    def held(self) -> tuple[Tensor, ...]:
        """Every tensor that grows with a token."""
        return tuple(x for x in (self.keys, self.plain_keys, self.values) if x is not None)

    def make_room(self, new: RoutedProblem) -> None:
        """Check the capacity.

        True lengths are read only where the bound that the host knows would overflow.
        """
        added = new.q.shape[2]
        if self.longest + added <= self.capacity:
            return
        self.longest = int(self.lengths.max())
        needed = int((self.lengths + (added if new.lengths is None else new.lengths)).max())
        if needed > self.capacity:
            raise ValueError(
                f"cache: capacity is {self.capacity} tokens, {needed} are needed; build it with "
                f"capacity={needed}"
            )

    def unrolled(self, new: RoutedProblem) -> RoutedProblem:
        """A chunk behind a ring.

        Of each row what the ring holds, in order, then its new tokens, then what nothing sees.
        """
        # a ring is kept for local experts, which are rotary
        assert self.keys is not None and self.values is not None
        T = new.q.shape[2]
        held = self.lengths.clamp_max(self.slots)[:, None]  # [B, 1]
        entry = torch.arange(self.slots + T, device=new.q.device)
        old = (self.lengths[:, None] - held + entry) % self.slots
        fresh = (self.slots + 1 + entry - held).clamp_max(self.slots + T)
        # [B, 1, S + T, 1] among slots and new tokens
        place = torch.where(entry < held, old, fresh)[:, None, :, None]
        k, v = (
            torch.cat(pair, 2).gather(2, place.expand(-1, pair[1].shape[1], -1, pair[1].shape[3]))
            for pair in ((self.keys, new.k), (self.values, new.v))
        )
        return replace(new, k=k, v=v, plain_q=new.q, plain_k=k, starts=held[:, 0])

    def write(self, new: RoutedProblem) -> None:
        """Store keys and values at each row's own positions."""
        if self.values is None:
            return
        T = new.q.shape[2]
        pairs = [
            (x, y)
            for x, y in ((self.keys, new.k), (self.plain_keys, new.plain_k), (self.values, new.v))
            if x is not None
        ]
        # what padding writes is overwritten before it is seen
        if self.longest == 0 and not self.ring and self.slots >= T:
            for store, x in pairs:
                store[:, :, :T] = x
            return
        step = torch.arange(T, device=new.q.device)
        added = T if new.lengths is None else new.lengths[:, None]
        positions = self.lengths[:, None] + step  # [B, T]
        kept = (step < added) & (step >= added - self.slots)
        slot = torch.where(kept, positions % self.slots, self.slots)
        row = torch.arange(slot.shape[0], device=slot.device)[:, None]
        for store, x in pairs:
            store[row, :, slot] = x.transpose(1, 2)  # [B, T, Hkv, Dh]
