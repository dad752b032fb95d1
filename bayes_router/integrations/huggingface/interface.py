"""The attention function that transformers 5 calls for a patched model.

And the hook that hands it hidden states.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from bayes_router.attention.kernels.eager.fused import keep_layout
from bayes_router.checks import require
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.calls.masks import OfLast, padding_of
from bayes_router.integrations.calls.tracing import exporting, traced
from bayes_router.integrations.huggingface.growing_cache import (
    counter_of,
    empty,
    filled_slots,
    held_keys,
)
from bayes_router.integrations.patch.binding import BINDING, Binding
from bayes_router.integrations.patch.passes import Given

MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}
PREFIX = "bayes_router_"
NAME = PREFIX + "{}"

Observer = Callable[[nn.Module, Tensor, Tensor, bool, "int | None"], None]
"""(module, q, k, causal, window of the layer's own) of every call."""


class Watching(threading.local):
    """Who is shown the calls of one thread."""

    observers: tuple[Observer, ...] = ()


watching = Watching()


def original_kernel(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that the model would have called."""
    if base == "eager":
        function: Callable[..., tuple[Tensor, Any]] = sys.modules[
            type(module).__module__
        ].eager_attention_forward
        return function
    found: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[base]
    return found


def routed_interface(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """An attention function: routes a bound module, leaves any other as it was."""
    original = original_kernel(base, module)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    for observe in watching.observers:
        observe(module, query, key, bool(causal), kwargs.get("sliding_window"))
    binding = getattr(module, BINDING, None)
    if not isinstance(binding, Binding) or not binding.awaits:
        return original(module, query, key, value, attention_mask, **kwargs)
    if weights_wanted(module, kwargs):
        binding.require_full("output_attentions")
        return original(module, query, key, value, attention_mask, **kwargs)
    attention_mask, kwargs = folded(attention_mask, kwargs, query, key, bool(causal))
    whole, filled, held = (key, value, attention_mask), binding.filled, binding.held
    plain = base == "sdpa" and not kwargs.get("dropout") and kwargs.get("s_aux") is None
    if held is not None and not plain:
        filled, held = int(held) - query.shape[2], None
    if filled is not None:
        key, value, attention_mask = (
            without_empty(x, d, filled, query) for x, d in zip(whole, (2, 2, 3), strict=True)
        )

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if k is key and v is value and mask is attention_mask:
            # with the empty slots, which are hidden: the very call that the layer made
            k, v, mask = whole
        if base == "eager" and mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(
                ~mask, torch.finfo(q.dtype).min
            )
        out: Tensor = original(module, q, k, v, mask, **kwargs)[0]
        return keep_layout(out).transpose(1, 2)  # [B, Tq, H, Dv] -> [B, H, Tq, Dv]

    scaling = kwargs.get("scaling")
    call = AttentionCall(
        query,
        key,
        value,
        attention_mask,
        bool(causal),
        kernel,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        plain,
        _padding(attention_mask, query.shape[2], bool(causal))
        if _readable(attention_mask, query)
        else None,
        held=held,
    )
    return binding.attend(call).transpose(1, 2).contiguous(), None


def without_empty(x: Any, dim: int, filled: int, query: Tensor) -> Any:
    """Keys, values or mask of a static cache without its empty slots.

    The queries are then the last of the keys.
    """
    return None if x is None else x.narrow(dim, 0, min(filled + query.shape[2], x.shape[dim]))


def weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller asks for attention weights, which a mixture of experts has not."""
    # some architectures pass the argument no further
    collector = getattr(output_capturing, "_active_collector", None)
    if torch.compiler.is_dynamo_compiling():  # a context variable cannot be traced
        collected = getattr(collector, "global_var", None)
    else:
        collected = None if collector is None else collector.get()
    configured = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(
        kwargs.get("output_attentions") or configured or (collected and "attentions" in collected)
    )


def folded(
    mask: Tensor | None, kwargs: dict[str, Any], query: Tensor, key: Tensor, causal: bool
) -> tuple[Tensor | None, dict[str, Any]]:
    """Mask and arguments with a bias of positions (T5) in the mask.

    Experts cut the mask by query and key; mask and bias are added.
    """
    bias = kwargs.get("position_bias")
    if bias is None:
        return mask, kwargs
    Tq, Tk, hidden = query.shape[2], key.shape[2], torch.finfo(key.dtype).min
    if mask is None and causal:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=key.device).tril(Tk - Tq)
    if mask is not None:  # a new tensor: what is shared between layers is not written to
        bias = torch.where(mask, bias, hidden) if mask.dtype == torch.bool else bias + mask
    return bias.contiguous(), {
        name: value for name, value in kwargs.items() if name != "position_bias"
    }


_padding = OfLast(padding_of)


def _readable(mask: Tensor | None, query: Tensor) -> bool:
    """Whether what a mask hides is worth reading, and can be.

    What is traced, to export it or to compile it with gradients, has no values yet.
    """
    valued = not exporting() and not torch.compiler.is_dynamo_compiling()
    return mask is not None and query.shape[2] > 1 and valued


def keep_hidden(
    binding: Binding, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward pre-hook of an attention module.

    What its controller reads, unless the call is one that is left alone.

    Raises:
        ValueError: the model was switched to attention that cannot be routed, or runs as a replica
            of `DataParallel`.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    cache = kwargs.get("past_key_values")
    if not torch.compiler.is_dynamo_compiling():
        if binding.router.still_leaves(binding.index, hidden, cache):
            return
        binding.router.here.left = None  # this call is no part of a pass that is left alone
    cache = kwargs.get("layer_past") if cache is None else cache
    require(
        not getattr(module, "_is_replica", False),
        "model",
        "one process a device where tokens are routed",
        "a replica of DataParallel",
        "use DistributedDataParallel, or unpatch() first",
    )
    follow_switch(module)
    crossed = (
        kwargs.get("encoder_hidden_states") is not None
        or kwargs.get("key_value_states") is not None
    )
    if not isinstance(hidden, Tensor) or crossed or left_alone(binding, module, hidden, cache):
        binding.give(None)
    elif getattr(cache, "is_compileable", False):
        layer, new = getattr(module, "layer_idx", None), hidden.shape[1]
        counter = counter_of(cache, layer)
        if counter is not None and traced():
            binding.give(Given(hidden, held=counter + new))
        elif (
            counter is not None
            and new == 1
            and binding.router.steps_in_place(binding.index, hidden)
        ):
            binding.give(Given(hidden, held=counter))
        else:
            binding.give(Given(hidden, filled=filled_slots(cache, layer)))
    elif traced():
        binding.give(Given(hidden))
    else:
        past = (
            None if cache is None else (cache, held_keys(cache, getattr(module, "layer_idx", None)))
        )
        binding.give(Given(hidden, past))


def left_alone(binding: Binding, module: nn.Module, hidden: Tensor, cache: Any) -> bool:
    """Whether a short text is the layer's own matter: nothing of a patch stands around its call."""
    causal, place = binding.router.found[binding.index].causal, getattr(module, "layer_idx", None)
    first = causal and not traced() and empty(cache, place)
    return first and binding.router.leaves(binding.index, hidden, cache)


def require_answered(binding: Binding, module: nn.Module, args: Any, out: Any) -> None:
    """Forward hook of an attention module: routing never ends in silence.

    Raises:
        ValueError: the module attended without the registered function.
    """
    awaits = binding.index in binding.router.here.given
    if awaits and getattr(module, BINDING, None) is binding:
        binding.give(None)
        raise ValueError(
            f"attn_implementation: expected sdpa or eager while {type(module).__name__} is routed; "
            f"its attention was "
            "switched to another after the patch; unpatch() first, and patch again"
        )


def follow_switch(module: nn.Module) -> None:
    """Route under the kernel that the model was switched to after the patch.

    By `set_attn_implementation` or its config.

    Raises:
        ValueError: that kernel cannot be routed.
    """
    config = getattr(module, "config", None)
    name = getattr(config, "_attn_implementation", None)
    own = "forward" in module.__dict__  # of this project, and asks for no name (Falcon)
    if own or config is None or name is None or name.startswith(PREFIX):
        return
    fix = "unpatch() first, or call model.set_attn_implementation('sdpa')"
    require(
        name in MASKS, "attn_implementation", "sdpa or eager while the model is patched", name, fix
    )
    config._attn_implementation_internal = NAME.format(name)
