"""The layers of nn.TransformerEncoder around a routed attention.

Their fused fast path is taken where the original takes it.

In evaluation mode PyTorch computes a whole encoder layer in one operator, padded batches without
their padding; its outputs are zero at padding and differ from the written-out path by rounding.
Where every token of a layer is on `full` that operator is run, so the outputs are the original's;
else the layer is written out, and padding comes out as the original's.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from bayes_router.integrations.patch.binding import BINDING, Binding, all_on


def no_fast_path(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook that does nothing.

    With a hook below it, an encoder layer is written out and calls this module.
    """


def fused(module: nn.Module) -> bool:
    """Whether a module is an encoder layer as PyTorch has it, which `forward` serves."""
    kind = type(module)
    return issubclass(kind, nn.TransformerEncoderLayer) and (kind.forward, kind._sa_block) == (
        nn.TransformerEncoderLayer.forward,
        nn.TransformerEncoderLayer._sa_block,
    )


def forward(
    self: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """With the arguments of `nn.TransformerEncoderLayer.forward`."""
    binding: Binding = getattr(self.self_attn, BINDING)
    router, index, own = binding.router, binding.index, type(self).forward
    if self.training:
        return own(self, src, src_mask, src_key_padding_mask, is_causal)
    lengths = (
        torch.tensor([len(row) for row in src.unbind()], device=src.device)
        if src.is_nested
        else None
    )
    x, padding = src, src_key_padding_mask
    if lengths is not None:
        x = src.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    if not router.observed:
        read = self.norm1(x) if self.norm_first else x
        route = router.route(index, batched(read, self.self_attn.batch_first), unhidden(padding))
        if all_on(route, router.experts.index("full")):
            return own(unhooked(self), src, src_mask, src_key_padding_mask, is_causal)
        router.here.decided[index] = route
    out = own(self, x, src_mask, padding, is_causal)
    if lengths is None:
        return out
    return torch.nested.as_nested_tensor(
        [row[:length] for row, length in zip(out, lengths.tolist(), strict=True)]
    )


def batched(x: Tensor, batch_first: bool) -> Tensor:
    """[B, T, D] of what PyTorch's modules take.

    A sequence without a batch, or sequences, in either layout.
    """
    return x[None] if x.dim() == 2 else x if batch_first else x.transpose(0, 1)


def unhidden(padding: Tensor | None) -> Tensor | None:
    """[B, T] bool of a key padding mask, bool (True hides) or float, [B, T] or [T]."""
    if padding is None:
        return None
    real = ~padding if padding.dtype == torch.bool else ~padding.isneginf()
    return real[None] if real.dim() == 1 else real


def unhooked(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    """The layer over the same parameters as it was before the patch: a view, made for one call."""
    attention, outer = view(layer.self_attn), view(layer)
    attention.__dict__["_forward_pre_hooks"] = OrderedDict(
        (key, hook)
        for key, hook in layer.self_attn._forward_pre_hooks.items()
        if hook is not no_fast_path
    )
    outer.__dict__["_modules"] = {**layer._modules, "self_attn": attention}
    return outer


def view(module: nn.Module) -> Any:
    """Another module of that class with the same state, without a forward pass of its own."""
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    other.__dict__.pop("forward", None)
    return other
