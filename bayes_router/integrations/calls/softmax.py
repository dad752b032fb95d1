"""The experts of a patched layer.

They take a call as the layer made it, with its own mask, heads and kernel.

The experts of `attention` are causal and know neither padding nor masks; those of an encoder see
both sides, and a pretrained layer brings masks of its own. So these are modules beside them, under
the same names and costs.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.eager.band import MIN_BLOCK, banded
from bayes_router.attention.kernels.eager.rows_softmax import softmax_rows
from bayes_router.attention.kernels.eager.threads import run
from bayes_router.attention.kernels.triton.operators import local_attention
from bayes_router.attention.shapes import ExpertShape
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.masks import first_seen, near, restrict

QUERIES = 256  # in one block of masked attention


class PatchedExpert(nn.Module):
    """One mechanism of a patched layer.

    `shape` as of any expert, `sinks` first tokens that `local` never loses.
    """

    def __init__(self, shape: ExpertShape, kv_heads: int, sinks: int = 0):
        super().__init__()
        self.shape, self.kv_heads, self.sinks = shape, kv_heads, sinks

    def forward(self, call: AttentionCall) -> Tensor:
        """Every query of the call: [B, H, Tq, Dv]."""
        raise NotImplementedError

    def in_place(self, call: AttentionCall) -> bool:
        """Whether one new token reads its keys where they lie.

        A part of the batch is then attended without copies.
        """
        return False

    def splits(self, call: AttentionCall) -> bool:
        """Whether the heads of a key head are computed without the others."""
        return False

    def narrowed(self, call: AttentionCall) -> AttentionCall:
        """The call of one new token with the keys alone that this expert may read.

        `read` attends over it.
        """
        return call

    def read(self, call: AttentionCall) -> Tensor:
        """`forward` of a call that `narrowed` gave: [B, H, 1, Dv]."""
        out: Tensor = self(call)
        return out

    def rows(self, call: AttentionCall, rows: Tensor) -> Tensor:
        """The queries `rows` [n], ascending, of a call of one sequence: [1, H, n, Dv]."""
        out: Tensor = self(call)
        return out[:, :, rows]


class SoftmaxExpert(PatchedExpert):
    """The layer's own kernel over the keys that its mask and `allowed` leave."""

    def splits(self, call: AttentionCall) -> bool:
        """See `PatchedExpert.splits`: plain softmax attention knows no head by name."""
        return call.plain

    def allowed(self, visible: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
        """Which keys this expert may see; None: all."""
        return None

    def forward(self, call: AttentionCall) -> Tensor:
        """See `PatchedExpert.forward`."""
        query, key = call.positions()
        return self._attend(call, call.q, call.mask, call.visible, query, key)

    def rows(self, call: AttentionCall, rows: Tensor) -> Tensor:
        """See `PatchedExpert.rows`.

        Blocks of neighbouring queries, each over the keys that one of them sees.
        """
        call = call.explicit()
        query, key = call.positions()
        blocks = []
        for part in torch.split(rows, QUERIES):
            mask = None if call.mask is None else call.mask[:, :, part]
            visible = replace(call, mask=mask, q=call.q[:, :, part]).visible
            blocks.append(
                self._attend(call, call.q[:, :, part], mask, visible, query[part], key, prune=True)
            )
        return torch.cat(blocks, 2)

    def _attend(
        self,
        call: AttentionCall,
        q: Tensor,
        mask: Tensor | None,
        visible: Callable[[], Tensor],
        query: Tensor,
        key: Tensor,
        prune: bool = False,
    ) -> Tensor:
        k, v = call.k, call.v
        allowed = self.allowed(visible(), query, key, call.causal) if self._narrows else None
        if allowed is not None:
            mask = restrict(mask, allowed & visible())
        if mask is not None and prune:
            kept = (
                (visible() if allowed is None else allowed & visible())
                .flatten(0, 2)
                .any(0)
                .nonzero()[:, 0]
            )
            if 0 < len(kept) < k.shape[2]:
                k, v, mask = k[:, :, kept], v[:, :, kept], mask[..., kept]
        return call.kernel(q, k, v, mask)

    _narrows = False


class FullExpert(SoftmaxExpert):
    """The layer's own attention, untouched: bit for bit the original."""

    def in_place(self, call: AttentionCall) -> bool:
        """See `PatchedExpert.in_place`."""
        return True

    def forward(self, call: AttentionCall) -> Tensor:
        """See `PatchedExpert.forward`."""
        return call.kernel(call.q, call.k, call.v, call.mask)


class LocalExpert(SoftmaxExpert):
    """The layer's own attention under a window of W keys.

    With `sinks`, also the first keys that a query sees.

    Pretrained decoders park attention on their first tokens; a window without them costs much more
    (Xiao et al. 2023, arXiv 2309.17453). Causal: keys t - W + 1 .. t. Not causal: W keys around the
    query. Whatever the layer's mask hides stays hidden.
    """

    _narrows = True

    def allowed(self, visible: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
        """See `SoftmaxExpert.allowed`."""
        band = near(query, key, self.shape.window, causal)[None, None]
        return band | first_seen(visible, self.sinks) if self.sinks else band

    def forward(self, call: AttentionCall) -> Tensor:
        """See `PatchedExpert.forward`."""
        window, Tq, Tk = self.shape.window, call.q.shape[2], call.k.shape[2]
        if call.dense and Tk <= (window if call.causal else (window + 1) // 2):
            return call.kernel(call.q, call.k, call.v, call.mask)  # the window hides nothing
        if Tq == 1 and call.causal and self._by_position(call):
            return self._joined(call) if self.in_place(call) else self.read(self.narrowed(call))
        if call.dense and call.causal and call.plain and Tq > max(window, MIN_BLOCK):
            if (
                call.q.device.type == "cpu"
                and not torch.is_grad_enabled()
                and call.q.shape[3] == call.v.shape[3]
            ):
                return self._by_tiles(call)
            if capability.available(call.q, call.k, call.v):
                return local_attention(call.rescaled(), call.k, call.v, window, self.sinks)
            return banded(call.q, call.k, call.v, window, self.sinks, call.scaling)
        return super().forward(call)

    def _by_position(self, call: AttentionCall) -> bool:
        """Whether the first keys that a query sees are the same for all heads."""
        return not self.sinks or call.mask is None or call.mask.shape[1] == 1

    def in_place(self, call: AttentionCall) -> bool:
        """See `PatchedExpert.in_place`.

        Where attention is plain and matrix products keep its precision, on a CPU.
        """
        plain = call.plain and call.causal and (call.mask is None or call.mask.shape[1] == 1)
        return (
            plain and call.q.device.type == "cpu" and call.q.dtype in (torch.float32, torch.float64)
        )

    def narrowed(self, call: AttentionCall) -> AttentionCall:
        """See `PatchedExpert.narrowed`: the sinks and the window."""
        if call.k.shape[2] <= self.shape.window or not call.causal or not self._by_position(call):
            return call
        *front, (k, v, mask) = self._pieces(call)
        for first_k, first_v, first_mask in front:
            k, v = torch.cat([first_k, k], 2), torch.cat([first_v, v], 2)
            mask = None if mask is None or first_mask is None else torch.cat([first_mask, mask], 3)
        return replace(call, k=k, v=v, mask=mask, padding=None, memory=None)

    def _pieces(self, call: AttentionCall) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(keys, values, mask) of the sinks before the window and of the window.

        They are slices of the cached ones; padding moves sinks.
        """
        window = min(self.shape.window, call.k.shape[2])
        before, sinks = call.k.shape[2] - window, min(self.sinks, call.k.shape[2] - window)
        mask = None if call.mask is None else call.mask[..., before:]
        last = (call.k[:, :, before:], call.v[:, :, before:], mask)
        if not sinks:
            return [last]
        if call.mask is None:
            return [(call.k[:, :, :sinks], call.v[:, :, :sinks], None), last]
        # [B or 1, Tk], a key that is seen: its place among those
        order = call.visible()[:, 0, 0].int().cumsum(-1)
        place = torch.arange(1, self.sinks + 1, device=order.device)
        at = (order[:, None] == place[:, None]).int().argmax(-1)  # [B or 1, sinks]
        there = (order[:, -1:] >= place) & (at < before)  # those in the window are there already
        index = at.expand(len(call.q), -1)[:, None, :, None]
        k, v = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (call.k, call.v))
        # [B or 1, 1, 1, sinks]
        shown = restrict(call.mask.gather(3, at[:, None, None]), there[:, None, None])
        return [(k, v, shown), last]

    def _joined(self, call: AttentionCall) -> Tensor:
        """One new token: one softmax over the sinks and the window, whose keys are not copied."""
        pieces = self._pieces(call)
        # [B, Hkv, G, Dh]
        q = call.q.reshape(len(call.q), call.k.shape[1], -1, call.q.shape[3]) * call.scaling
        weights = torch.cat([_masked(q @ k.mT, mask) for k, _, mask in pieces], 3).softmax(3)
        (_, v, _), past = pieces[-1], weights.shape[3] - pieces[-1][0].shape[2]
        out = weights[..., past:] @ v
        if past:
            out = out + weights[..., :past] @ pieces[0][1]
        return out.reshape(*call.q.shape[:3], -1)

    def _by_tiles(self, call: AttentionCall) -> Tensor:
        """Every query of whole texts, in the dispatcher's tiles."""
        shape, positions = self.shape._replace(sinks=self.sinks), torch.arange(call.q.shape[2])
        q = call.q * (call.scaling * call.q.shape[3] ** 0.5)  # tiles divide by sqrt(Dh)
        rows = [
            run(softmax_rows(*one, positions, shape))[0]
            for one in zip(q, call.k, call.v, strict=True)
        ]
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]

    def read(self, call: AttentionCall) -> Tensor:
        """See `PatchedExpert.read`."""
        if not self._by_position(call):
            return super().forward(call)
        return call.kernel(call.q, call.k, call.v, call.mask)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores of one token with its mask, bool or additive."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
