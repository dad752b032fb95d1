"""A layer's cache in which some key heads keep their window alone.

Their query heads never look further: all of their tokens take local attention, or an expert that
keeps a state. The keys and values that nobody reads again are not stored.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayes_router.attention.decoding.cache import LayerCache, own_path
from bayes_router.attention.decoding.step import attend_one
from bayes_router.attention.decoding.store import KeyStore
from bayes_router.attention.experts.contract import Expert, Kernel
from bayes_router.attention.hard.backend import Backend, run
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.checks import require


class FreedCache(LayerCache):
    """See the module; `keys`, `values` and `plain_keys` are those of the other heads.

    Args:
        experts: as of `LayerCache`.
        batch: rows.
        capacity: tokens of a row.
        num_kv_heads: of the layer.
        short: the key heads that keep a window, or nothing where no expert is local.
        device: of the tensors.
        dtype: of keys and values.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        batch: int,
        capacity: int,
        num_kv_heads: int,
        short: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        fits = list(short) == sorted(set(short)) and set(short) <= set(range(num_kv_heads))
        require(fits, "short", f"key heads of 0..{num_kv_heads - 1}, ascending", list(short))
        whole = [head for head in range(num_kv_heads) if head not in short]
        super().__init__(
            experts, batch, capacity, num_kv_heads, device=device, dtype=dtype, whole=whole
        )
        near = [e for e in self.experts if e.kernel is Kernel.LOCAL and not e.stateful]
        self.near = KeyStore(near, capacity, self._like[:, list(short)])
        self.near.lengths = self.lengths
        group = self.experts[0].shape.num_heads // num_kv_heads
        self._heads = {
            keys: ([head * group + i for head in keys for i in range(group)], list(keys))
            for keys in (tuple(whole), tuple(short))
        }
        self._whole, self._short = tuple(whole), tuple(short)
        self._far = [
            i for i, e in enumerate(self.experts) if not e.stateful and e.kernel is not Kernel.LOCAL
        ]

    def held(self) -> tuple[Tensor, ...]:
        """See `KeyStore.held`."""
        return (*super().held(), *self.near.held())

    def write(self, new: RoutedProblem) -> None:
        """See `KeyStore.write`; of the heads that keep all."""
        super().write(self._part(new, self._whole))

    def _fused(self, new: RoutedProblem) -> bool:
        return False  # one kernel reads one store

    def _part(self, new: RoutedProblem, keys: tuple[int, ...]) -> RoutedProblem:
        """The problem of some key heads and of the query heads that share them."""
        queries, heads = self._heads[keys]
        q, k, units = new.q[:, queries], new.k[:, heads], new.q.shape[1] // new.units
        return replace(
            new,
            q=q,
            k=k,
            v=new.v[:, heads],
            plain_q=q if new.plain_q is new.q else new.plain_q[:, queries],
            plain_k=k if new.plain_k is new.k else new.plain_k[:, heads],
            route=new.route.repeat_interleave(units, 2)[:, :, queries],
        )

    def _attend(self, new: RoutedProblem, weights: Tensor | None, choice: Backend) -> Tensor:
        fix = "a cache of model.network.new_cache keeps every key"
        require(weights is None, "route", "choices, behind a cache that was freed", "weights", fix)
        near = self._part(new, self._short)
        self._check_near(near.route)
        self.near.longest, late = self.longest, self.near.ring and not own_path(new, choice)
        if not late:
            self.near.write(near)
        out = super()._attend(new, None, choice)
        if late:
            self.near.write(near)
        return out

    def _check_near(self, route: Tensor) -> None:
        """Raise a ValueError where a head looks further than its keys go; on CUDA, assert it."""
        far = torch.zeros((), dtype=torch.bool, device=route.device)
        for index in self._far:
            far = far | (route == index).any()
        if route.device.type == "cuda":
            torch._assert_async(~far, "a key head that was freed is asked for all its keys")
            return
        require(
            not bool(far),
            "cache",
            "one that was made under the units that are frozen now",
            "a key head that was freed, and a route that reads all of its keys",
            "build it with new_cache of this model",
        )

    def _looked_up(self, new: RoutedProblem, choice: Backend) -> Tensor:
        if self.longest == 0:
            return super()._looked_up(new, choice)
        out = torch.zeros_like(new.q)
        if self._whole:
            whole = self._part(new, self._whole)
            out[:, self._heads[self._whole][0]] = super()._looked_up(whole, choice)
        out[:, self._heads[self._short][0]] = self._near_by(self._part(new, self._short), choice)
        return out

    def _near_by(self, new: RoutedProblem, choice: Backend) -> Tensor:
        """The rows of local attention of the heads that keep a window."""
        store = self.near
        if store.keys is None or store.values is None:
            return torch.zeros_like(new.q)
        new = replace(new, elsewhere=frozenset({*new.elsewhere, *self._far}))
        own = own_path(new, choice)
        if store.ring and not own:
            return run(choice, store.unrolled(new))
        held = replace(
            new,
            k=store.keys,
            v=store.values,
            plain_q=new.q,
            plain_k=store.keys,
            starts=self.lengths,
        )
        return attend_one(held, store.slots, store.ring) if own else run(choice, held)
