"""Linear attention, plain or gated, of chosen queries in plain torch.

Every key enters the state, the chosen queries read it.

Letters as in `hard.rows`. Keys come in chunks: the masked product of a chunk's chosen queries with
its keys, and the state before it. A chunk's temporaries stay in the processor's cache and in the
memory of those before. With log gates the past fades by exp(their sum), as in
`GatedLinearAttention`; keys are then one a query head (Hk = H, else Hkv).
Why there is a sum of all tokens beside it stands at `chunks.causal_sum`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from bayes_router.attention.kernels.eager.chunks import EPSILON
from bayes_router.attention.kernels.eager.threads import Steps
from bayes_router.attention.shapes import widen

CHUNK = 128  # positions between two states
SHORT, SHORT_CHUNK = range(257, 1025), 64  # with so many keys, where no gradient is wanted
KEPT = 4  # chunks between two states that are kept for the backward pass


class State(NamedTuple):
    """What the keys so far add up to: of phi(k) v^T [Hk, Dh, Dh] and of phi(k) [Hk, 1, Dh]."""

    s: Tensor
    z: Tensor


class Features(NamedTuple):
    """A chunk as the sums take it, at least float32 and contiguous."""

    queries: Tensor  # phi of the chosen ones [H, m, Dh]
    keys: Tensor  # phi of all [Hk, C, Dh]
    values: Tensor  # [Hk, C, Dh]
    log_gate: Tensor | None = None  # [Hk, C]


Before = Optional[State]
MakeFeatures = Callable[[Tensor, Tensor, Tensor], Features]


class Span(NamedTuple):
    """A chunk of keys, and which of the queries stand in it."""

    queries: slice
    keys: slice


class Chunk(NamedTuple):
    """Features of a chunk's keys, and of its chosen queries, packed by key head.

    Where no query is chosen, `queries` is empty.
    """

    keys: Tensor  # [Hk, C, Dh]
    values: Tensor  # [Hk, C, Dh]
    queries: Tensor  # [Hk, G * m, Dh]
    rows: Tensor  # [G * m], where these stand in the chunk
    decay: Tensor | None  # sums of the log gates from the start of the chunk [Hk, C]


def plain(queries: Tensor, k: Tensor, v: Tensor) -> Features:
    """The features of `LinearAttention`, which fade by nothing."""
    return Features(_phi(queries), _phi(k), widen(v).contiguous())


def _phi(x: Tensor) -> Tensor:
    """`feature_map` written with exp, which takes a fifth less time than elu."""
    x = widen(x).contiguous()
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


def linear_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    states: list[Before] | None = None,
    features: MakeFeatures = plain,
) -> Iterator[tuple[slice, Tensor]]:
    """Which of the ascending `rows` of q [H, Tq, Dh], and their output, chunk by chunk.

    The output [m, H, Dh] is float32.

    What `backward` needs is appended to `states`.
    """
    state: Before = None
    size = SHORT_CHUNK if states is None and k.shape[1] in SHORT else CHUNK
    spans = _spans(rows + (k.shape[1] - q.shape[1]), k.shape[1], size)
    for number, span in enumerate(spans):
        if states is not None and number % KEPT == 0:
            states.append(state)
        chunk = _chunk(q, k, v, rows, span, features)
        if chunk.rows.numel():
            weight, norm, far = _weigh(chunk, state)
            out = torch.bmm(weight, chunk.values)
            out = (out if state is None else out.baddbmm_(far, state.s)).div_(norm)
            yield span.queries, out.view(q.shape[0], -1, v.shape[2]).transpose(0, 1)
        if number + 1 < len(spans):
            state = _add(state, chunk)


def linear_rows_backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, states: list[Before], out: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> Steps[None]:  # fmt: skip
    """Add the gradients of plain `attend` for `rows` of q [H, Tq, Dh] to dq, dk and dv.

    out and dout are the whole sequence's.

    The chunks are computed again, from the last to the first. With w the weights, n their sum, S
    and z the state before a chunk and dS and dz the gradient of the state after it:

        dsum = dout / n,  dn = -rowsum(dsum * out),  dw = visible * (dsum v^T + dn),
        phi' = min(phi, 1),  dphi_q = dw phi_k + dsum S^T + dn z,
        dphi_k = dw^T phi_q + v dS^T + dz,  dv = w^T dsum + phi_k dS,
        dS += phi_q^T dsum,  dz += dn^T phi_q
    """
    spans = _spans(rows + (k.shape[1] - q.shape[1]), k.shape[1], CHUNK)
    later: Before = None  # gradient of the state after a chunk
    for first in reversed(range(0, len(spans), KEPT)):
        here = spans[first : first + KEPT]
        chunks = [_chunk(q, k, v, rows, span, plain) for span in here]
        known = [states[first // KEPT]]
        for chunk in chunks[:-1]:
            known.append(_add(known[-1], chunk))
        for span, chunk, state in zip(
            reversed(here), reversed(chunks), reversed(known), strict=True
        ):
            own: tuple[Tensor, Tensor] | None = None
            after = later
            if chunk.rows.numel():
                mine = rows[span.queries]
                given, found = (
                    widen(take(x, mine)).reshape(chunk.queries.shape) for x in (dout, out)
                )
                dquery, own, before = _read_backward(chunk, state, given, found)
                add_rows(dq, mine, dquery.view(q.shape[0], -1, q.shape[2]))
                later = before if later is None else State(later.s + before.s, later.z + before.z)
            if after is not None:
                through = (
                    torch.bmm(chunk.values, after.s.transpose(1, 2)).add_(after.z),
                    torch.bmm(chunk.keys, after.s),
                )
                own = through if own is None else (own[0].add_(through[0]), own[1].add_(through[1]))
            if own is not None:
                dk[:, span.keys] += own[0].mul_(chunk.keys.clamp(max=1))
                dv[:, span.keys] += own[1]
            yield


def _read_backward(
    chunk: Chunk, state: Before, dout: Tensor, out: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], State]:
    """Gradients of the chunk's queries (before phi) and of the state.

    Also of its keys' features and values, by its own rows.
    """
    weight, norm, _ = _weigh(chunk, state)
    dsum = dout / norm
    dnorm = (dsum * out).sum(-1, keepdim=True).neg_()
    dweight = torch.bmm(dsum, chunk.values.transpose(1, 2)).add_(dnorm)
    dweight.masked_fill_(_hidden(chunk), 0)
    dquery = torch.bmm(dweight, chunk.keys)
    if state is not None:
        dquery.baddbmm_(dsum, state.s.transpose(1, 2)).add_(dnorm * state.z)
    dkey, dvalue = (
        torch.bmm(dweight.transpose(1, 2), chunk.queries),
        torch.bmm(weight.transpose(1, 2), dsum),
    )
    s, z = (
        torch.bmm(x.transpose(1, 2), y) for x, y in ((chunk.queries, dsum), (dnorm, chunk.queries))
    )
    return dquery.mul_(chunk.queries.clamp(max=1)), (dkey, dvalue), State(s, z)


def _spans(positions: Tensor, num_keys: int, size: int) -> list[Span]:
    """The chunks of so many keys up to the last with a query."""
    edges = range(size, int(positions[-1]) // size * size + size + 1, size)
    stops = torch.searchsorted(positions, torch.tensor(edges, device=positions.device)).tolist()
    starts = [0, *stops[:-1]]
    ends = zip(starts, stops, edges, strict=True)
    return [
        Span(slice(start, stop), slice(edge - size, min(edge, num_keys)))
        for start, stop, edge in ends
    ]


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, span: Span, features: MakeFeatures
) -> Chunk:
    mine, keys, past = rows[span.queries], span.keys, k.shape[1] - q.shape[1]
    x = features(take(q, mine), k[:, keys], v[:, keys])
    Hk, C, Dh = x.keys.shape
    groups = q.shape[0] // Hk
    own = mine + (past - keys.start)
    decay = None if x.log_gate is None else x.log_gate.cumsum(1)
    return Chunk(
        x.keys,
        x.values,
        x.queries.view(Hk, -1, Dh),
        own.repeat(groups) if groups > 1 else own,
        decay,
    )


def _hidden(chunk: Chunk) -> Tensor:
    """Where a query of the chunk does not see a key of it, bool [G * m, C]."""
    return torch.arange(chunk.keys.shape[1], device=chunk.rows.device) > chunk.rows[:, None]


def _weigh(chunk: Chunk, state: Before) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the chunk's keys, their normaliser, and the queries as the state sees them.

    Weights are [Hk, G * m, C]; the normaliser sums them and all before.
    """
    queries = chunk.queries
    weight = torch.bmm(queries, chunk.keys.transpose(1, 2)).masked_fill_(_hidden(chunk), 0)
    if chunk.decay is not None:
        here = chunk.decay.index_select(1, chunk.rows)[..., None]  # [H, m, 1]
        # positive for later keys, which are not seen
        weight = weight.mul_((here - chunk.decay[:, None]).clamp_(max=0).exp_())
        queries = queries * here.exp()
    norm = weight.sum(-1, keepdim=True)
    norm = norm if state is None else norm + (queries * state.z).sum(-1, keepdim=True)
    return weight, norm + EPSILON, queries


def _add(state: Before, chunk: Chunk) -> State:
    """The state after the chunk."""
    keys = chunk.keys
    if chunk.decay is not None:
        total = chunk.decay[:, -1:, None]  # [H, 1, 1]
        keys = keys * (total - chunk.decay[..., None]).exp()
        state = None if state is None else State(state.s * total.exp(), state.z * total.exp())
    s, z = keys.transpose(1, 2), keys.sum(1, keepdim=True)
    if state is None:
        return State(torch.bmm(s, chunk.values), z)
    return State(torch.baddbmm(state.s, s, chunk.values), state.z + z)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x [H, T, Dh]: [H, n, Dh], by tokens, as models lay them out.

    A token is copied as one piece.
    """
    return x.transpose(0, 1).index_select(0, rows).transpose(0, 1)


def add_rows(x: Tensor, rows: Tensor, added: Tensor) -> None:
    """Add [H, n, Dh] to different rows of x [H, T, Dh].

    Torch's own index_add_ takes rows one by one.
    """
    x.transpose(0, 1).index_copy_(0, rows, (take(x, rows) + added).transpose(0, 1))
