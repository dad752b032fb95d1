"""What decoding remembers.

One store of keys and values for all experts, and the state of each expert that keeps one.

Every token enters both, whatever its own route, so a later token may take any expert and decoding
step by step equals the full pass. Rows of a batch may have different lengths: each appends at its
own position.

On CUDA nothing waits for the device, but for: a pass that might overflow the capacity, an expert of
the user's (with padding, or where it looks at keys), the backends `torch`, `dense` and `reference`,
and chunks in float64. A decoding step may be captured in a CUDA graph: what it remembers stays in
the tensors where it was. A replay does not move `longest`, so whoever replays must see to the room;
a row without any is a device-side assertion.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayes_router.attention.decoding.inputs import check_tensor, described, hard_choices
from bayes_router.attention.decoding.state import extend
from bayes_router.attention.decoding.step import attend_one
from bayes_router.attention.decoding.store import KeyStore
from bayes_router.attention.experts.contract import Expert, Kernel
from bayes_router.attention.experts.gated import GatedLinearAttention
from bayes_router.attention.hard.auto import AUTO
from bayes_router.attention.hard.backend import Backend, able, backend_of, run
from bayes_router.attention.hard.problem import RoutedProblem, check_problem
from bayes_router.attention.hard.sorted import TRITON
from bayes_router.attention.kernels import capability
from bayes_router.attention.shapes import by_head, with_units

# as the decoding kernel takes them
NATIVE = (Kernel.FULL, Kernel.LINEAR, Kernel.LOCAL, Kernel.GATED)


class LayerCache(KeyStore):
    """The past of one layer.

    Attributes:
        experts: those of the layer; their states and keys are what is held.
        states: by expert index, what each stateful expert keeps, changed in place.
        keys, values, plain_keys, lengths, longest: see `KeyStore`.
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
        whole: Sequence[int] | None = None,
    ):
        """An empty one; with `whole` it stores the keys of these key heads alone."""
        self.experts = tuple(experts)
        sinks = max((e.shape.sinks for e in self.experts if e.kernel is Kernel.LOCAL), default=0)
        if sinks:  # a ring overwrites the first keys, and no decoding kernel looks for them
            raise ValueError(
                f"sinks: expected 0, a cache keeps no first keys for local attention; got {sinks}"
            )
        num_heads, head_dim = self.experts[0].shape[:2]
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a number that divides the {num_heads} query heads; got "
                f"{num_kv_heads}"
            )
        like_q = torch.empty(batch, num_heads, 0, head_dim, device=device, dtype=dtype)
        like_k = torch.empty(batch, num_kv_heads, 0, head_dim, device=device, dtype=dtype)
        super().__init__(
            self.experts, capacity, like_k if whole is None else like_k[:, list(whole)]
        )
        self.states = {
            i: e.init_state(like_q, like_k, like_k)
            for i, e in enumerate(self.experts)
            if e.stateful
        }
        self._like = like_k
        kinds = [_step_kernel(expert) for expert in self.experts]
        self._native = tuple(kinds.index(kind) if kind in kinds else -1 for kind in NATIVE)

    @property
    def bytes(self) -> int:
        """Size of everything held."""
        return sum(x.numel() * x.element_size() for x in (*self.held(), *self.states.values()))

    def reset(self) -> None:
        """Forget every token."""
        self.lengths.zero_()
        for state in self.states.values():
            state.zero_()
        self.longest = 0

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was (beam search); index int64 [B]."""
        batch, device = len(self.lengths), self.lengths.device
        check_tensor("index", index)
        if (
            index.shape != self.lengths.shape
            or index.device != device
            or index.dtype != torch.int64
        ):
            raise ValueError(
                f"index: expected int64 of shape {(batch,)} on {device}; "
                f"got {index.dtype} of shape {tuple(index.shape)} on {index.device}"
            )
        if device.type == "cpu" and batch and not 0 <= int(index.min()) <= int(index.max()) < batch:
            raise ValueError(f"index: expected rows 0..{batch - 1}; got {index.tolist()}")
        for x in (*self.held(), *self.states.values(), self.lengths):
            x.copy_(x.index_select(0, index))

    def check_owner(self, experts: Iterable[object], name: str = "cache") -> None:
        """Raise a ValueError unless this cache was built for these very experts.

        `name` it in the message.

        Sizes do not tell models apart: another model's gates would read a state that other gates
        wrote.
        """
        own = tuple(experts)
        if len(own) == len(self.experts) and all(
            a is b for a, b in zip(own, self.experts, strict=True)
        ):
            return
        raise ValueError(
            f"{name}.experts: expected this layer's own experts, {described(own)}; "
            f"got those of another layer or model, {described(self.experts)}; build it with "
            f"new_cache of this model"
        )

    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        route: Tensor | int,
        *,
        linear_q: Tensor | None = None,
        linear_k: Tensor | None = None,
        lengths: Tensor | None = None,
        backend: Backend | str = AUTO,
    ) -> Tensor:
        """Append T tokens to each row and attend over all that it then holds: [B, H, T, Dh].

        Prefill, chunked prefill and decoding alike. No gradients.

        Args:
            q: [B, H, T, Dh], rotated by each row's own positions (`lengths` of this cache and on).
            k: [B, Hkv, T, Dh], likewise.
            v: as k.
            route: int64 or int32 [B, T, R] (or [B, T]), hard, a choice for each of R units of H / R
                neighbouring query heads; or floating [B, T, R, E] (or [B, T, E]), every expert
                weighed; or one int for all tokens.
            linear_q: plain queries for experts without rotary positions; default q.
            linear_k: plain keys for them; default k.
            lengths: [B] how many of the T tokens are real, the rest is right padding, finite;
                default all.
            backend: as in `routed_attention`. Under `auto` and `triton` a decoding step of one
                token has its own path.

        Raises:
            ValueError: an argument that does not fit; a cache that is too small, or of another
                model or batch.
            RuntimeError: the backend asked for cannot run here, with the reason. Nothing is written
                then.
        """
        choice = backend_of(backend)
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, x, 4)
        for name, optional in (
            ("linear_q", linear_q),
            ("linear_k", linear_k),
            ("lengths", lengths),
        ):
            if optional is not None:
                check_tensor(name, optional)
        plain_q, plain_k = q if linear_q is None else linear_q, k if linear_k is None else linear_k
        choices = hard_choices(q, route, len(self.experts), self._like.shape[1])
        new = RoutedProblem(q, k, v, plain_q, plain_k, choices, self.experts, lengths)
        self._check(new)
        able(choice, new if self.longest == 0 else replace(new, elsewhere=frozenset(self.states)))
        self.make_room(new)
        weights = (
            with_units(route) if isinstance(route, Tensor) and route.is_floating_point() else None
        )
        if weights is None and choice in (AUTO, TRITON) and self._fused(new):
            out = self._decode_fused(new)
        else:
            out = self._attend(new, weights, choice)
        self.lengths += new.q.shape[2] if lengths is None else lengths
        self.longest += new.q.shape[2]
        return out

    def _attend(self, new: RoutedProblem, weights: Tensor | None, choice: Backend) -> Tensor:
        """Attend and remember.

        With `weights` [B, T, R, E] every expert is weighed, else `new.route` counts.
        """
        if new.q.device.type == "cuda":
            self._assert_on_device(new)
        extended = {
            i: extend(self.experts[i], new, state, self.longest == 0)
            for i, state in self.states.items()
        }
        dense = {i: out for i, (out, _) in extended.items() if out is not None}
        # a chunk may overwrite what its first queries see
        late = self.ring and not own_path(new, choice)
        if not late:
            self.write(new)
        if weights is None:
            out = self._hard(new, dense, choice)
        else:
            out = torch.zeros_like(new.q)
            for index in range(len(self.experts)):
                one = replace(new, route=torch.full_like(new.route, index))
                rows = dense[index] if index in dense else self._hard(one, {}, choice)
                out = out + by_head(weights[..., index].to(out.dtype), out.shape[1]) * rows
        if late:
            self.write(new)
        for index, (_, state) in extended.items():
            self.states[index].copy_(state)
        return out

    def _fused(self, new: RoutedProblem) -> bool:
        """Whether the Triton kernel takes this decoding step.

        All experts that look at keys are its own.
        """
        native = all(e.stateful or i in self._native for i, e in enumerate(self.experts))
        return native and _one_token(new) and capability.computes(new.q)

    def _decode_fused(self, new: RoutedProblem) -> Tensor:
        """Full, local, linear and gated experts by the kernel.

        Any other that keeps a state by its own pass.
        """
        # only where it can be imported
        from bayes_router.attention.kernels.triton.launch_decode import GatedStep, decode_step

        full, linear, local, gated = self._native
        expert = self.experts[gated] if gated >= 0 else None
        step = None
        if isinstance(expert, GatedLinearAttention):
            step = GatedStep(
                gated, self.states[gated], expert.gate, expert.gate_bias, expert.log_scale
            )
        inputs = (new.q, new.k, new.v, new.plain_q, new.plain_k)
        q, k, v, plain_q, plain_k = (x if x.stride(3) == 1 else x.contiguous() for x in inputs)
        window = self.experts[local].shape.window if local >= 0 else 1
        with torch.cuda.device_of(q):
            out = decode_step(
                q, k, v, plain_q, plain_k, self.keys, self.values, self.states.get(linear),
                new.route, self.lengths,
                (full, linear, local), window, gated=step, num_experts=len(self.experts),
                slots=self.slots, ring=self.ring,
            )  # fmt: skip
        for index, state in self.states.items():
            if index not in self._native:
                rows, after = self.experts[index].extend(*new.inputs(self.experts[index]), state)
                out = torch.where(new.chosen(index), rows, out)
                state.copy_(after)
        return out

    def _check(self, new: RoutedProblem) -> None:
        check_problem(new)
        q, k, like, shape = new.q, new.k, self._like, self.experts[0].shape
        got = (k.shape[0], q.shape[1], k.shape[1], k.shape[3], k.dtype, k.device)
        expected = (
            like.shape[0],
            shape.num_heads,
            like.shape[1],
            like.shape[3],
            like.dtype,
            like.device,
        )
        if got != expected:
            raise ValueError(
                f"cache: built for (batch, heads, key heads, head_dim, dtype, device) = "
                f"{expected}; got {got}; "
                "build one for this model and batch with RoutedCache.build"
            )

    def _assert_on_device(self, new: RoutedProblem) -> None:
        """What `_check` and `make_room` do not read on CUDA.

        A route out of range or a row without room ends the program.
        """
        fits = (new.route >= 0) & (new.route < len(self.experts))  # [B, T, R]
        real = new.real()
        torch._assert_async(
            (fits if real is None else fits | ~real[..., None]).all(), "route out of range"
        )
        after = self.lengths + (new.q.shape[2] if new.lengths is None else new.lengths)
        torch._assert_async((after <= self.capacity).all(), "the cache is full")

    def _hard(self, new: RoutedProblem, dense: dict[int, Tensor], choice: Backend) -> Tensor:
        """The output of one hard route, those in `dense` known; nothing is remembered here."""
        elsewhere = dense if self.longest == 0 else self.states
        out = self._looked_up(replace(new, elsewhere=frozenset(elsewhere)), choice)
        for index, rows in dense.items():
            out = torch.where(new.chosen(index), rows, out)
        return out

    def _looked_up(self, new: RoutedProblem, choice: Backend) -> Tensor:
        """The rows of all experts that are not elsewhere; zero there."""
        if self.longest == 0:  # the tokens see only each other
            return run(choice, new)
        if self.values is None:
            return torch.zeros_like(new.q)
        own = own_path(new, choice)
        if self.ring and not own:
            held = self.unrolled(new)
        else:
            keys = self.values if self.keys is None else self.keys
            plain_keys = keys if self.plain_keys is None else self.plain_keys
            held = replace(new, k=keys, v=self.values, plain_k=plain_keys, starts=self.lengths)
        return attend_one(held, self.slots, self.ring) if own else run(choice, held)


def _step_kernel(expert: Expert) -> Kernel:
    """The kernel that computes this expert's part of a decoding step.

    It knows no other map or gate than the library's.
    """
    return (
        Kernel.NONE
        if isinstance(expert, GatedLinearAttention) and not expert.fixed_map
        else expert.kernel
    )


def _one_token(new: RoutedProblem) -> bool:
    return new.q.shape[2] == 1 and new.lengths is None


def own_path(new: RoutedProblem, choice: Backend) -> bool:
    """Whether `attend_one` computes it, and not a backend."""
    return _one_token(new) and choice is AUTO
