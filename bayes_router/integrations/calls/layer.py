"""One routed attention layer of a patched model.

Its experts, and how a route over them is executed.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.experts.full import FullAttention
from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.hard.problem import shared_expert
from bayes_router.attention.kernels import capability
from bayes_router.attention.shapes import ExpertShape, by_head, unit_heads, with_units
from bayes_router.checks import require
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.linear import GatedExpert, LinearExpert
from bayes_router.integrations.calls.masks import OfLast
from bayes_router.integrations.calls.precision import cast, exact
from bayes_router.integrations.calls.softmax import FullExpert, LocalExpert, PatchedExpert
from bayes_router.integrations.calls.step import attend_one, remember

EXPERTS: dict[str, type[PatchedExpert]] = {
    "full": FullExpert,
    "local": LocalExpert,
    "mapped": LinearExpert,
    "gated": GatedExpert,
}


def patched_expert(
    name: str, shape: ExpertShape, kv_heads: int, sinks: int, causal: bool
) -> PatchedExpert:
    """Build the expert called `name`, one of `EXPERTS`.

    Raises:
        ValueError: it does not see both sides, and the layer does.
    """
    require(
        causal or name != "gated",
        "experts",
        "experts that see both sides, for layers that are not causal",
        name,
        "use 'mapped': gated attention forgets the past alone",
    )
    return EXPERTS[name](shape, kv_heads, sinks)


class RoutedLayer(nn.Module):
    """The experts of one layer; all take the layer's own q, k, v.

    Parameters are float32 where the model's are narrower.
    """

    def __init__(
        self, names: tuple[str, ...], shape: ExpertShape, kv_heads: int, sinks: int, causal: bool
    ):
        super().__init__()
        self.names, self.shape, self.sinks = names, shape, sinks
        self.experts = nn.ModuleList(
            patched_expert(name, shape, kv_heads, sinks, causal) for name in names
        )

    def expert(self, index: int) -> PatchedExpert:
        """By index into `names`."""
        expert = self.experts[index]
        assert isinstance(expert, PatchedExpert)
        return expert

    def attend(self, call: AttentionCall, route: Tensor | int) -> Tensor:
        """[B, H, Tq, Dv] for a route.

        Weights [B, Tq, R, E] (all experts are computed), choices int64 [B, Tq, R], or one expert
        for all.

        A route without its unit dimension holds for all heads.
        """
        call, route = cast(call), route if isinstance(route, int) else with_units(route)
        with exact(call.q.device):
            out = self._attend(call, route)
            remember(self.experts, call, route)
        return out

    def _attend(self, call: AttentionCall, route: Tensor | int) -> Tensor:
        if isinstance(route, int):
            # the kernel knows how many keys there are, the layer's own if a mask says so
            if call.held is not None and (self.names[route] != "full" or call.mask is None):
                return attend_one(self.experts, call, route_of(route, call))
            out: Tensor = self.expert(route)(call)
            return out
        if not route.is_floating_point():
            return self._hard(call, route)
        heads, mixed = call.q.shape[1], None
        # each expert once, whatever the number of units
        for i, weight in enumerate(route.to(call.q.dtype).unbind(-1)):
            part = by_head(weight, heads) * self.expert(i)(call)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return mixed

    def _hard(self, call: AttentionCall, route: Tensor) -> Tensor:
        # no traced graph can look at the choices
        if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
            return self._attend(call, one_hot(route, len(self.names)).to(call.q.dtype))
        if route.shape[1] == 1 and call.causal:
            return attend_one(self.experts, call, route)
        if self.without_waiting(call):
            return self._dispatch(call, route, list(range(len(self.names))))
        # [E]
        each = (
            (route[..., None] == torch.arange(len(self.names), device=route.device))
            .flatten(0, 2)
            .any(0)
        )
        # waits for the device, once
        taken = [index for index, some_take in enumerate(each.tolist()) if some_take]
        if len(taken) == 1:
            return self._attend(call, taken[0])
        if self._dispatchable(call):
            # indices into `taken`
            among = route if len(taken) == len(self.names) else (each.cumsum(0) - 1)[route]
            shift = unpadding(call)
            if shift is not None:
                return shift.back(
                    self._dispatch(shift.call, shift.route(among), taken, shift.lengths)
                )
            if call.mask is None:
                return self._dispatch(call, among, taken)
        return self._by_rows(call, route, taken)

    def without_waiting(self, call: AttentionCall) -> bool:
        """Whether nobody has to ask which experts were taken: kernels compute all of them, and what
        none took costs nothing.
        """
        native = all(name in ("full", "local") for name in self.names)
        return (
            native
            and call.mask is None
            and self._dispatchable(call)
            and capability.computes(call.q, call.k, call.v)
        )

    def _by_rows(self, call: AttentionCall, route: Tensor, taken: list[int]) -> Tensor:
        """Text by text, expert by expert.

        The queries that some head sends there, and of these the heads that do.

        The heads of each key head alone, where an expert computes some heads without the others.
        """
        out = call.v.new_zeros(*call.q.shape[:3], call.v.shape[3])
        H, Hkv = call.q.shape[1], call.k.shape[1]
        of_head = by_head(route, H)[..., 0]  # [B, H or 1, Tq]
        for index in taken:
            expert = self.expert(index)
            apart = route.shape[2] > 1 and expert.splits(call)
            for b, (queries, keys) in product(
                range(len(route)), unit_heads(Hkv if apart else 1, H, Hkv)
            ):
                chosen = of_head[b, queries] == index  # [heads, Tq]
                rows = chosen.any(0).nonzero()[:, 0]
                if rows.numel():
                    one = call.batch(rows.new_tensor([b]))
                    found = expert.rows(one.heads(queries, keys) if apart else one, rows)[0]
                    where = chosen[:, rows, None]
                    out[b, queries, rows] = torch.where(where, found, out[b, queries][:, rows])
        return out

    def _dispatchable(self, call: AttentionCall) -> bool:
        """Whether the dispatcher's kernels compute what this layer means.

        Plain causal attention of a text over itself.
        """
        same = call.q.shape[3] == call.v.shape[3] == call.k.shape[3]
        return call.plain and call.causal and same and 1 < call.q.shape[2] == call.k.shape[2]

    def _dispatch(
        self, call: AttentionCall, route: Tensor, taken: list[int], lengths: Tensor | None = None
    ) -> Tensor:
        """By `routed_attention`: only what each token took is computed, in sorted blocks.

        route [B, T, R] into `taken`.
        """
        experts = [self._native(index, call) for index in taken]
        return routed_attention(
            call.rescaled(),
            call.k,
            call.v,
            route,
            window=self.shape.window,
            linear_q=call.q,
            linear_k=call.k,
            lengths=lengths,
            experts=experts,
        )

    def _native(self, index: int, call: AttentionCall) -> Expert:
        """The dispatcher's own expert where it computes the same.

        Else this layer's behind its contract.
        """
        name = self.names[index]
        if name == "full":
            return shared_expert(FullAttention, self.shape)
        if name == "local":
            return shared_expert(LocalAttention, self.shape._replace(sinks=self.sinks))
        return _Adapter(self.expert(index), self.shape, call)


def route_of(expert: int, call: AttentionCall) -> Tensor:
    """[B, Tq, 1]: every token on one expert."""
    return torch.full(
        (len(call.q), call.q.shape[2], 1), expert, dtype=torch.int64, device=call.q.device
    )


@dataclass(frozen=True)
class Unpadding:
    """A padded batch with every text moved to the front of its row, as the dispatcher wants it."""

    call: AttentionCall
    lengths: Tensor  # [B] real tokens
    first: Tensor  # [B, 1] where each text began

    def route(self, route: Tensor) -> Tensor:
        """Choices [B, T, R], moved as the tokens were."""
        place = _rotation(self.first, route.shape[1])[..., None]
        return route.gather(1, place.expand(-1, -1, route.shape[2]))

    def back(self, out: Tensor) -> Tensor:
        """[B, H, T, D] with every text where it was; zeros on padding."""
        return _move(out, -self.first)


def unpadding(call: AttentionCall) -> Unpadding | None:
    """The call without its padding, left or right.

    None without padding, or where there is some inside a text.
    """
    texts = None if call.padding is None else _texts(call.padding)
    if texts is None:
        return None
    lengths, first = texts
    q, k, v = (_move(x, first) for x in (call.q, call.k, call.v))
    return Unpadding(replace(call, q=q, k=k, v=v, mask=None, padding=None), lengths, first)


@OfLast
def _texts(padding: Tensor) -> tuple[Tensor, Tensor] | None:
    """(length [B], beginning [B, 1]) of the one text in each row of real tokens [B, T].

    None where there are several.
    """
    first, lengths = padding.int().argmax(1, keepdim=True), padding.sum(1)
    T = padding.shape[1]
    packed = padding.gather(1, _rotation(first, T))
    one = torch.equal(packed, torch.arange(T, device=first.device) < lengths[:, None])
    return (lengths, first) if one else None


def _rotation(first: Tensor, T: int) -> Tensor:
    """[B, T]: index first[b] + t, around the end."""
    return (torch.arange(T, device=first.device) + first) % T


def _move(x: Tensor, first: Tensor) -> Tensor:
    """[B, H, T, D] with token first[b] of each row in front."""
    index = _rotation(first, x.shape[2])[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


class _Adapter(Expert):
    """A patched expert behind the contract of `attention`.

    It takes the layer's own, unscaled queries.
    """

    rotary = False

    def __init__(self, inner: PatchedExpert, shape: ExpertShape, call: AttentionCall):
        super().__init__(shape)
        self.inner, self.call = inner, call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Expert.forward`; of one sequence of the batch where the backend works row by row."""
        call = replace(self.call, q=q, k=k, v=v)
        out: Tensor = self.inner(call)
        return out
