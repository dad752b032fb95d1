"""Full and local attention of gathered queries, in tiles, forward and backward, in plain torch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.attention.kernels.eager.rows_linear import add_rows, take
from bayes_router.attention.kernels.eager.threads import Steps
from bayes_router.attention.shapes import ExpertShape, widen

ROWS = 192  # packed queries in a tile with a mask
FAR_ROWS = 768  # queries that share one tile, without a mask, over the keys that all of them see
SPAN = 128  # positions in a tile of local queries, at least
BLOCK = 192  # positions in a tile of full and local queries together
# packed queries that such a tile is to have, where these do not span more than the window
LOCAL_ROWS = 384
KEYS = 512  # keys of a tile in the backward pass, at most: their gradients are temporaries


class Tile(NamedTuple):
    """Queries and the keys that they are compared with at a time."""

    queries: slice  # of the gathered ones
    keys: slice
    masked: bool  # some query does not see some key
    joins: bool  # the queries had other keys before


def tiles(positions: Tensor, local: ExpertShape | None, groups: int) -> Iterator[Tile]:
    """The tiles of queries at ascending positions [n].

    Full: for FAR_ROWS queries the keys before the first of them, which all see, then the same for
    ROWS of them at a time, and what is left with a mask. Local: blocks of S positions, wherever in
    them the chosen are, so that a tile has at most S + W - 1 keys, of which a query sees W; then
    the sinks before these, which all see.
    """
    if local is not None:
        # positions to a chosen one
        stretch = int(positions[-1] - positions[0] + 1) // len(positions)
        counts = torch.bincount(
            positions // max(min(LOCAL_ROWS * stretch // groups, local.window), SPAN)
        )
        stop = 0
        for count in counts[counts > 0].tolist():
            start, stop = stop, stop + count
            first = max(int(positions[start]) - local.window + 1, 0)
            yield Tile(slice(start, stop), slice(first, int(positions[stop - 1]) + 1), True, False)
            if before := min(local.sinks, first):
                yield Tile(slice(start, stop), slice(0, before), False, True)
        return
    total, size = len(positions), max(ROWS // groups, 1)
    for start in range(0, total, FAR_ROWS):
        stop, first = min(start + FAR_ROWS, total), int(positions[start])
        first = first if first >= SPAN else 0  # a few keys are not worth a tile of their own
        if first:
            yield Tile(slice(start, stop), slice(0, first), False, False)
        for near in range(start, stop, size):
            here, own = (
                slice(near, min(near + size, stop)),
                int(positions[near]) if near > start else first,
            )
            if own > first:
                yield Tile(here, slice(first, own), False, first > 0)
            yield Tile(here, slice(own, int(positions[here.stop - 1]) + 1), True, own > 0)


def blocks(positions: Tensor) -> Iterator[Tile]:
    """The tiles of queries of which some see all keys before them and some a window: blocks of
    positions, and all keys up to each.
    """
    stop = 0
    for count in torch.bincount(positions // BLOCK).tolist():
        start, stop = stop, stop + count
        if count:
            yield Tile(slice(start, stop), slice(0, int(positions[stop - 1]) + 1), True, False)


class _Masks:
    """Masks of tiles, each written over the one before.

    Fresh pages of memory cost more than filling them.

    Whether a key is seen depends on its distance alone, but for sinks: a mask is rows of a table
    that repeats one line, each time a key further on, and copying them takes a tenth of the time of
    comparing positions.
    """

    def __init__(self, local: ExpertShape | None, groups: int, like: Tensor, num_keys: int):
        self.groups, self.num_keys, self.room = groups, num_keys, like.new_empty(0)
        self.sinks = 0 if local is None else local.sinks
        # of the distance from query to key, num_keys at zero
        self.causal = like.new_zeros(2 * num_keys)
        self.causal[num_keys + 1 :] = -torch.inf
        self.line = self.causal
        if local is not None:
            self.line = self.causal.repeat(2)  # that of a window, then that without
            self.line[: max(num_keys - local.window + 1, 0)] = -torch.inf

    def of(self, positions: Tensor, keys: slice, wide: Tensor | None = None) -> Tensor:
        """[groups * n, keys]: 0 where visible, -inf elsewhere; good until the next.

        Queries that are `wide` [n] see all keys before them, the others a window.
        """
        width = keys.stop - keys.start
        size = self.groups * len(positions) * width
        if self.room.numel() < size:
            self.room = self.causal.new_empty(size)
        mask = self.room[:size].view(-1, width)
        places = (self.num_keys + keys.start) - positions
        rows = places if wide is None else places + 2 * self.num_keys * wide
        if self.groups > 1:
            places, rows = places.repeat(self.groups), rows.repeat(self.groups)
        torch.index_select(_shifted(self.line, width), 0, rows, out=mask)
        if (sunk := min(self.sinks - keys.start, width)) > 0:
            mask[:, :sunk] = _shifted(self.causal, sunk).index_select(0, places)
        return mask


def _shifted(line: Tensor, width: int) -> Tensor:
    """[n, width], row i is line[i : i + width]; a view."""
    return line.as_strided((line.numel() - width + 1, width), (1, 1))


def softmax_rows(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    local: ExpertShape | None,
    wide: Tensor | None = None,
) -> Steps[tuple[Tensor, Tensor]]:
    """Full or local attention of gathered queries [H, n, Dh], tile by tile; where there is `wide`,
    bool [n], full of these and local of the others.

    (output, log of the softmax normaliser [H, n]).
    """
    H, n, Dh = queries.shape
    groups = H // k.shape[0]
    masks = _Masks(local, groups, queries, k.shape[1])
    pieces = list(tiles(positions, local, groups) if wide is None else blocks(positions))
    if len(pieces) == 1:
        keys = pieces[0].keys
        return _tile(queries, k[:, keys], v[:, keys], masks.of(positions, keys, wide))
    out = queries.new_empty(n, H, Dh).transpose(0, 1)
    normaliser = torch.empty(H, n, device=queries.device, dtype=widen(queries[:0]).dtype)
    for tile in pieces:
        here, keys = tile.queries, tile.keys
        which = None if wide is None else wide[here]
        mask = masks.of(positions[here], keys, which) if tile.masked else None
        found, lse = _tile(queries[:, here], k[:, keys], v[:, keys], mask)
        if tile.joins:
            before = normaliser[:, here]
            found = torch.lerp(
                found, out[:, here], torch.sigmoid(before - lse)[..., None].to(out.dtype)
            )
            lse = torch.logaddexp(before, lse)
        out[:, here] = found
        normaliser[:, here] = lse
        yield
    return out, normaliser


def softmax_rows_backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, lse: Tensor, out: Tensor, dout: Tensor,
    local: ExpertShape | None,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> Steps[None]:  # fmt: skip
    """Add the gradients of `softmax_rows` at `rows` of q to dq, dk and dv, tile by tile.

    out and dout are those of the whole sequence.

    Given the output and normaliser over all keys, a gradient is a sum over keys, taken KEYS at a
    time: p = exp(s - lse), dv = p^T dout, ds = p * (dout v^T - rowsum(dout * out)).
    """
    groups, positions = q.shape[0] // k.shape[0], rows + (k.shape[1] - q.shape[1])
    masks = _Masks(local, groups, q, k.shape[1])
    for tile in tiles(positions, local, groups):
        here = tile.queries
        dout_here, q_here, out_here = (take(x, rows[here]) for x in (dout, q, out))
        found_q = torch.zeros_like(q_here, dtype=dq.dtype)
        for first in range(tile.keys.start, tile.keys.stop, KEYS):
            keys = slice(first, min(first + KEYS, tile.keys.stop))
            mask = masks.of(positions[here], keys) if tile.masked else None
            found = _tile_backward(
                dout_here, q_here, out_here, lse[:, here], k[:, keys], v[:, keys], mask
            )
            found_q += found[0]
            dk[:, keys] += found[1]
            dv[:, keys] += found[2]
        add_rows(dq, rows[here], found_q)
        yield


def _fused(x: Tensor) -> bool:
    """Whether torch has an operator for a tile here; elsewhere its formula is written out."""
    return x.device.type == "cpu"


def _tile(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(softmax(q k^T / sqrt(Dh) + mask) v [H, n, Dh], log of its normaliser [H, n])."""
    packed = q.reshape(1, k.shape[0], -1, q.shape[2])  # [H, n, Dh] -> [1, Hkv, G * n, Dh]
    if _fused(q):  # only this operator returns the normaliser
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            packed, k[None], v[None], attn_mask=mask
        )
        return out.reshape(q.shape), lse.reshape(q.shape[:2])
    scores = _scores(packed[0], k, mask)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp().to(v.dtype) @ v).reshape(q.shape), lse.reshape(
        q.shape[:2]
    )


def _tile_backward(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v by one tile."""
    Hkv = k.shape[0]
    x, dx, y = (a.reshape(1, Hkv, -1, a.shape[2]) for a in (q, dout, out))
    lse = lse.reshape(1, Hkv, -1)
    if _fused(q):
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(dx, x, k[None], v[None], y, lse, 0.0, False, attn_mask=mask)
        return dq.reshape(q.shape), dk[0], dv[0]
    p = (_scores(x[0], k, mask) - lse[0, ..., None]).exp()
    dx, y = widen(dx[0]), widen(y[0])
    ds = p * (dx @ widen(v).transpose(1, 2) - (dx * y).sum(-1, keepdim=True)) / q.shape[2] ** 0.5
    return (
        (ds @ widen(k)).reshape(q.shape),
        ds.transpose(1, 2) @ widen(x[0]),
        p.transpose(1, 2) @ dx,
    )


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = widen(q) @ widen(k).transpose(1, 2) / q.shape[-1] ** 0.5
    return scores if mask is None else scores + mask
