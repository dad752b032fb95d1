"""The experts of a patched layer: they take a call as the layer made it, with its own mask, heads and kernel.

The experts of `attention` are causal and know neither padding nor masks; those of an encoder see both sides, and a
pretrained layer brings masks of its own. So these are modules beside them, under the same names and costs.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bayes_router.attention.expert import ExpertShape
from bayes_router.attention.local import MIN_BLOCK, banded
from bayes_router.integrations.call import AttentionCall, first_seen, near, restrict

QUERIES = 256  # in one block of masked attention


class PatchedExpert(nn.Module):
    """One mechanism of a patched layer; `shape` as of any expert, `sinks` first tokens that `local` never loses."""

    def __init__(self, shape: ExpertShape, kv_heads: int, sinks: int = 0):
        super().__init__()
        self.shape, self.kv_heads, self.sinks = shape, kv_heads, sinks

    def forward(self, call: AttentionCall) -> Tensor:
        """Every query of the call: [B, H, Tq, Dv]."""
        raise NotImplementedError

    def narrowed(self, call: AttentionCall) -> AttentionCall:
        """The call of one new token with the keys alone that this expert may read; `read` attends over it."""
        return call

    def read(self, call: AttentionCall) -> Tensor:
        """`forward` of a call that `narrowed` gave: [B, H, 1, Dv]."""
        out: Tensor = self(call)
        return out

    def rows(self, call: AttentionCall, rows: Tensor) -> Tensor:
        """The queries `rows` [n], ascending, of a call of one sequence: [1, H, n, Dv]."""
        return self(call)[:, :, rows]


class SoftmaxExpert(PatchedExpert):
    """The layer's own kernel over the keys that its mask and `allowed` leave."""

    def allowed(self, visible: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
        """Which keys this expert may see; None: all."""
        return None

    def forward(self, call: AttentionCall) -> Tensor:
        """See `PatchedExpert.forward`."""
        query, key = call.positions()
        return self._attend(call, call.q, call.mask, call.visible, query, key)

    def rows(self, call: AttentionCall, rows: Tensor) -> Tensor:
        """See `PatchedExpert.rows`: blocks of neighbouring queries, each over the keys that one of them sees."""
        call = call.explicit()
        query, key = call.positions()
        blocks = []
        for part in rows.split(QUERIES):
            mask = None if call.mask is None else call.mask[:, :, part]
            visible = replace(call, mask=mask, q=call.q[:, :, part]).visible
            blocks.append(self._attend(call, call.q[:, :, part], mask, visible, query[part], key, prune=True))
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
            kept = (visible() if allowed is None else allowed & visible()).flatten(0, 2).any(0).nonzero()[:, 0]
            if 0 < len(kept) < k.shape[2]:
                k, v, mask = k[:, :, kept], v[:, :, kept], mask[..., kept]
        return call.kernel(q, k, v, mask)

    _narrows = False


class FullExpert(SoftmaxExpert):
    """The layer's own attention, untouched: bit for bit the original."""

    def forward(self, call: AttentionCall) -> Tensor:
        """See `PatchedExpert.forward`."""
        return call.kernel(call.q, call.k, call.v, call.mask)


class LocalExpert(SoftmaxExpert):
    """The layer's own attention under a window of W keys, and, with `sinks`, the first keys that a query sees.

    Pretrained decoders park attention on their first tokens; a window without them costs much more (Xiao et al. 2023,
    arXiv 2309.17453). Causal: keys t - W + 1 .. t. Not causal: W keys around the query. Whatever the layer's mask hides
    stays hidden.
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
            return self.read(self.narrowed(call))
        if call.dense and call.causal and call.plain and Tq > max(window, MIN_BLOCK):
            return banded(call.q, call.k, call.v, window, self.sinks, call.scaling)
        return super().forward(call)

    def _by_position(self, call: AttentionCall) -> bool:
        """Whether the first keys that a query sees are the same for all heads."""
        return not self.sinks or call.mask is None or call.mask.shape[1] == 1

    def narrowed(self, call: AttentionCall) -> AttentionCall:
        """See `PatchedExpert.narrowed`: the sinks and the window, slices of the cached keys; padding moves the sinks."""
        window, before = self.shape.window, call.k.shape[2] - self.shape.window
        if before <= 0 or not call.causal or not self._by_position(call):
            return call
        k, v = call.k[:, :, -window:], call.v[:, :, -window:]
        mask = None if call.mask is None else call.mask[..., -window:]
        if not self.sinks:
            return replace(call, k=k, v=v, mask=mask, padding=None, memory=None)
        if call.mask is None:
            first = slice(0, min(self.sinks, before))
            k, v = torch.cat([call.k[:, :, first], k], 2), torch.cat([call.v[:, :, first], v], 2)
            return replace(call, k=k, v=v, padding=None, memory=None)
        assert mask is not None
        order = call.visible()[:, 0, 0].int().cumsum(-1)  # [B or 1, Tk], the how-manieth key that is seen
        place = torch.arange(1, self.sinks + 1, device=order.device)
        at = (order[:, None] == place[:, None]).int().argmax(-1)  # [B or 1, sinks]
        there = (order[:, -1:] >= place) & (at < before)  # those in the window are there already
        index = at.expand(len(call.q), -1)[:, None, :, None]
        firsts = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (call.k, call.v)]
        shown = restrict(call.mask.gather(3, at[:, None, None]), there[:, None, None])  # [B or 1, 1, 1, sinks]
        k, v = torch.cat([firsts[0], k], 2), torch.cat([firsts[1], v], 2)
        return replace(call, k=k, v=v, mask=torch.cat([shown, mask], 3), padding=None, memory=None)

    def read(self, call: AttentionCall) -> Tensor:
        """See `PatchedExpert.read`."""
        if not self._by_position(call):
            return super().forward(call)
        return call.kernel(call.q, call.k, call.v, call.mask)
