"""What decoding remembers: one store of keys and values for all experts, and the state of each expert that keeps one.

Every token enters both, whatever its own route, so a later token may take any expert and decoding step by step equals the
full pass. Rows of a batch may have different lengths: each appends at its own position.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.decode import attend_one
from bayes_router.attention.dense_triton import HAS_TRITON
from bayes_router.attention.dispatch import Backend, pick_backend, run_problem
from bayes_router.attention.expert import Expert, widen
from bayes_router.attention.full import FullAttention
from bayes_router.attention.linear import LinearAttention, feature_map, with_ones
from bayes_router.attention.local import LocalAttention
from bayes_router.attention.problem import RoutedProblem, check_problem


class LayerCache:
    """The past of one layer.

    Attributes:
        lengths: [B] int64, tokens held of each row.
        keys: [B, Hkv, S + 1, Dh], rotated; slot S takes what padding would write. S is the capacity, or the widest window
            where no expert looks further (then a ring: position p is in slot p mod S). None where all experts keep a state.
        values: as keys.
        plain_keys: as keys, without rotary positions; kept only for an expert that wants them and keeps no state.
        states: by expert index, what each stateful expert keeps.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        batch: int,
        capacity: int,
        num_kv_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1 token; got {capacity}")
        self.experts, self.capacity = tuple(experts), capacity
        sinks = max((e.shape.sinks for e in self.experts if type(e) is LocalAttention), default=0)
        if sinks:  # a ring overwrites the first keys, and no decoding kernel looks for them
            raise ValueError(f"sinks: expected 0, a cache keeps no first keys for local attention; got {sinks}")
        num_heads, head_dim = self.experts[0].shape[:2]
        like_q = torch.empty(batch, num_heads, 0, head_dim, device=device, dtype=dtype)
        like_k = torch.empty(batch, num_kv_heads, 0, head_dim, device=device, dtype=dtype)
        stored = [e for e in self.experts if not e.stateful]
        self.ring = bool(stored) and all(type(e) is LocalAttention for e in stored)
        self.slots = min(capacity, max(e.shape.window for e in stored)) if self.ring else capacity if stored else 0
        self.ring = self.ring and self.slots < capacity

        def store(wanted: bool) -> Tensor | None:
            return like_k.new_zeros(batch, num_kv_heads, self.slots + 1, head_dim) if wanted else None

        self.keys = store(any(e.rotary for e in stored))
        self.plain_keys = store(any(not e.rotary for e in stored))
        self.values = store(bool(stored))
        self.states = {i: e.init_state(like_q, like_k, like_k) for i, e in enumerate(self.experts) if e.stateful}
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like_k.device)
        self.longest = 0  # an upper bound of lengths that the host knows
        self._like = like_k

    @property
    def bytes(self) -> int:
        """Size of everything held."""
        held = (self.keys, self.plain_keys, self.values, *self.states.values())
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def reset(self) -> None:
        """Forget every token."""
        self.lengths.zero_()
        for state in self.states.values():
            state.zero_()
        self.longest = 0

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was (beam search); index int64 [B]."""
        if index.shape != self.lengths.shape:
            raise ValueError(f"index: expected shape {tuple(self.lengths.shape)}; got {tuple(index.shape)}")
        for x in (self.keys, self.plain_keys, self.values, *self.states.values(), self.lengths):
            if x is not None:
                x.copy_(x.index_select(0, index))

    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        route: Tensor,
        *,
        linear_q: Tensor | None = None,
        linear_k: Tensor | None = None,
        lengths: Tensor | None = None,
        backend: Backend | str = Backend.AUTO,
    ) -> Tensor:
        """Append T tokens to each row and attend over all that it then holds: [B, H, T, Dh].

        Prefill, chunked prefill and decoding alike. No gradients.

        Args:
            q: [B, H, T, Dh], rotated by each row's own positions (`lengths` of this cache and on).
            k: [B, Hkv, T, Dh], likewise.
            v: as k.
            route: int64 or int32 [B, T], hard; or floating [B, T, E], every expert weighed.
            linear_q: plain queries for experts without rotary positions; default q.
            linear_k: plain keys for them; default k.
            lengths: [B] how many of the T tokens are real, the rest is right padding; default all.
            backend: as in `routed_attention`; a decoding step of one token has its own path.

        Raises:
            ValueError: the cache is too small, or of another model or batch.
        """
        plain_q, plain_k = q if linear_q is None else linear_q, k if linear_k is None else linear_k
        new = RoutedProblem(q, k, v, plain_q, plain_k, self._choices(q, route), self.experts, lengths)
        self._check(new)
        self._make_room(new)
        if self._fused(new, route):
            return self._decode_fused(new)
        extended = {index: self._extend(index, new) for index in self.states}
        late = self.ring and not _one_token(new)  # a chunk may overwrite what its first queries see
        if not late:
            self._write(new)
        if route.dim() == 2:
            out = self._hard(new, extended, Backend(backend))
        else:
            out = torch.zeros_like(q)
            for index in range(len(self.experts)):
                one = replace(new, route=torch.full_like(new.route, index))
                weight = route[..., index].to(q.dtype)[:, None, :, None]  # [B, 1, T, 1]
                out = out + weight * self._hard(one, extended, Backend(backend))
        if late:
            self._write(new)
        for index, (_, state) in extended.items():
            self.states[index] = state
        self.lengths += new.q.shape[2] if lengths is None else lengths
        self.longest += new.q.shape[2]
        return out

    def _fused(self, new: RoutedProblem, route: Tensor) -> bool:
        """Whether this is a decoding step that the Triton kernel does whole."""
        if not _one_token(new) or self.ring or route.dim() != 2 or new.q.device.type != "cuda" or not HAS_TRITON:
            return False
        kinds = [type(expert) for expert in self.experts]
        dim = new.q.shape[3]
        plain = len(set(kinds)) == len(kinds) and set(kinds) <= {FullAttention, LinearAttention, LocalAttention}
        return plain and dim in (16, 32, 64, 128, 256) and all(x.stride(3) == 1 for x in (new.q, new.k, new.v))

    def _decode_fused(self, new: RoutedProblem) -> Tensor:
        from bayes_router.attention.decode_triton import decode_step  # only where it can be imported

        kinds = [type(expert) for expert in self.experts]
        index = [kinds.index(kind) if kind in kinds else -1 for kind in (FullAttention, LinearAttention, LocalAttention)]
        state = self.states.get(index[1])
        window = self.experts[index[2]].shape.window if index[2] >= 0 else 1
        out = decode_step(
            new.q, new.k, new.v, new.plain_q, new.plain_k, self.keys, self.values, state, new.route, self.lengths,
            (index[0], index[1], index[2]), window,
        )  # fmt: skip
        self.lengths += 1
        self.longest += 1
        return out

    def _choices(self, q: Tensor, route: Tensor) -> Tensor:
        """[B, T] hard choices; zeros for a soft route of the right shape."""
        if route.dim() == 2:
            return route
        if tuple(route.shape) != (q.shape[0], q.shape[2], len(self.experts)):
            raise ValueError(f"route: expected [B, T] or [B, T, {len(self.experts)}]; got shape {tuple(route.shape)}")
        return torch.zeros(route.shape[:2], dtype=torch.int64, device=route.device)

    def _check(self, new: RoutedProblem) -> None:
        check_problem(new)
        q, k, like, shape = new.q, new.k, self._like, self.experts[0].shape
        got = (k.shape[0], q.shape[1], k.shape[1], k.shape[3], k.dtype, k.device)
        expected = (like.shape[0], shape.num_heads, like.shape[1], like.shape[3], like.dtype, like.device)
        if got != expected:
            raise ValueError(
                f"cache: built for (batch, heads, key heads, head_dim, dtype, device) = {expected}; got {got}; "
                "build one for this model and batch with RoutedCache.build"
            )

    def _make_room(self, new: RoutedProblem) -> None:
        """Check the capacity; true lengths are read only where the bound that the host knows would overflow."""
        added = new.q.shape[2]
        if self.longest + added <= self.capacity:
            return
        self.longest = int(self.lengths.max())
        needed = int((self.lengths + (added if new.lengths is None else new.lengths)).max())
        if needed > self.capacity:
            raise ValueError(f"cache: capacity is {self.capacity} tokens, {needed} are needed; build it with capacity={needed}")

    def _hard(self, new: RoutedProblem, extended: dict[int, tuple[Tensor | None, Tensor]], backend: Backend) -> Tensor:
        """The output of one hard route; nothing is remembered here."""
        if self.longest == 0:  # the tokens see only each other
            return run_problem(pick_backend(backend, new), new)
        out = self._stored(new, backend)
        for index, (dense, _) in extended.items():
            if dense is not None:
                out = torch.where((new.route == index)[:, None, :, None], dense, out)
        return out

    def _stored(self, new: RoutedProblem, backend: Backend) -> Tensor:
        """The rows of the experts that look at stored keys; zero elsewhere."""
        if self.values is None:
            return torch.zeros_like(new.q)
        new = replace(new, elsewhere=frozenset(self.states))
        if self.ring and not _one_token(new):
            rows = [run_problem(pick_backend(backend, one), one) for one in self._unrolled(new)]
            return torch.cat([F.pad(row, (0, 0, 0, new.q.shape[2] - row.shape[2])) for row in rows])
        keys = self.values if self.keys is None else self.keys
        plain_keys = keys if self.plain_keys is None else self.plain_keys
        held = replace(new, k=keys, v=self.values, plain_k=plain_keys, starts=self.lengths)
        if _one_token(new):
            return attend_one(held, self.slots, self.ring)
        return run_problem(pick_backend(backend, held), held)

    def _unrolled(self, new: RoutedProblem) -> list[RoutedProblem]:
        """Each row alone, what the ring holds of it in order before its new tokens."""
        assert self.keys is not None and self.values is not None  # a ring is kept for local experts, which are rotary
        B, _, T, _ = new.q.shape
        starts = self.lengths.tolist()
        lengths = [T] * B if new.lengths is None else new.lengths.tolist()
        problems = []
        for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            held = torch.arange(max(start - self.slots, 0), start, device=new.q.device) % self.slots
            row, real = slice(b, b + 1), slice(0, length)
            k = torch.cat([self.keys[row, :, held], new.k[row, :, real]], 2)
            v = torch.cat([self.values[row, :, held], new.v[row, :, real]], 2)
            q = new.q[row, :, real]
            problems.append(replace(new, q=q, k=k, v=v, plain_q=q, plain_k=k, route=new.route[row, real], lengths=None))
        return problems

    def _write(self, new: RoutedProblem) -> None:
        """Store keys and values at each row's own positions."""
        if self.values is None:
            return
        T = new.q.shape[2]
        pairs = [(x, y) for x, y in ((self.keys, new.k), (self.plain_keys, new.plain_k), (self.values, new.v)) if x is not None]
        if self.longest == 0 and not self.ring:  # what padding writes is overwritten before it is seen
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

    def _extend(self, index: int, new: RoutedProblem) -> tuple[Tensor | None, Tensor]:
        """(output of every new token, next state) of a stateful expert; no output where `_hard` computes it (nothing held)."""
        expert, state = self.experts[index], self.states[index]
        q, k, v = new.inputs(expert)
        real = new.real()
        if type(expert) is LinearAttention and self.longest == 0:
            phi_k = feature_map(widen(k)) if real is None else feature_map(widen(k)) * real[:, None, :, None]
            return None, phi_k.transpose(-1, -2) @ with_ones(widen(v))
        if real is None or q.shape[2] == 0:
            return expert.extend(q, k, v, state)
        outs, states = [], []
        for b, one in enumerate(new.sequences()):
            out, after = expert.extend(*one.inputs(expert), state[b : b + 1])
            outs.append(F.pad(out, (0, 0, 0, q.shape[2] - out.shape[2])))
            states.append(after)
        return torch.cat(outs), torch.cat(states)


def _one_token(new: RoutedProblem) -> bool:
    return new.q.shape[2] == 1 and new.lengths is None


class RoutedCache:
    """The caches of all layers, which hold the same tokens."""

    def __init__(self, layers: Sequence[LayerCache]):
        if not layers:
            raise ValueError("layers: expected at least one; got none")
        self.layers = tuple(layers)

    @classmethod
    def build(
        cls,
        experts: Sequence[Sequence[Expert]],
        batch: int,
        capacity: int,
        num_kv_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "RoutedCache":
        """An empty cache for `batch` sequences of at most `capacity` tokens; `experts` are those of each layer."""
        return cls([LayerCache(e, batch, capacity, num_kv_heads, device=device, dtype=dtype) for e in experts])

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    @property
    def lengths(self) -> Tensor:
        """[B] tokens that every layer holds: the position of each row's next token, also while a pass is under way."""
        return self.layers[-1].lengths

    @property
    def capacity(self) -> int:
        """Tokens that a row may hold."""
        return self.layers[0].capacity

    @property
    def bytes(self) -> int:
        """Size of everything held."""
        return sum(layer.bytes for layer in self.layers)

    def reset(self) -> None:
        """Forget every token."""
        for layer in self.layers:
            layer.reset()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was (beam search); index int64 [B]."""
        for layer in self.layers:
            layer.reorder(index)
