"""Which calls of a patched stack can be replayed from a CUDA graph, and why the others cannot."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils import output_capturing

from bayes_router.integrations.huggingface.aside import keep_first
from bayes_router.integrations.huggingface.interface import keep_hidden, require_answered
from bayes_router.integrations.huggingface.language import RoutedLanguage
from bayes_router.routing.policy import Argmax, Budget, Conservative

USUAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
IDLE = ("cache_position", "return_dict")
"""What `generate` of some versions adds, and positions and cache say already."""


GROWING = object()
"""In the place of a cache that is to be made and filled."""


class Replayable(NamedTuple):
    """One call of the stack that can be replayed."""

    tokens: Tensor  # int64 [B, T]
    cache: Any  # static: written and read; growing and empty, or GROWING: filled; None
    first: bool  # a prompt, else a step
    inputs: dict[str, Tensor]  # of a step: mask bool [B, 1, 1, S] and positions [B, 1]


def read(
    router: RoutedLanguage, base: nn.Module, args: Any, kwargs: dict[str, Any]
) -> Replayable | str:
    """What a call asks for, or why it runs as it is called."""
    given = dict(kwargs, input_ids=args[0]) if len(args) == 1 else kwargs
    tokens, cache = given.get("input_ids"), given.get("past_key_values")
    why = refused(router, base, given, args)
    if why is not None:
        return why
    assert isinstance(tokens, Tensor)
    B, T = tokens.shape
    config: Any = base.config
    keeps = given.get("use_cache", said(config, "use_cache", True)) is not False
    if isinstance(cache, StaticCache):
        if any(type(layer) is not StaticLayer for layer in cache.layers):
            return "a static cache with layers of another kind"
        layer, room = cache.layers[0], cache.layers[0].max_cache_len
        if T == 1 and layer.is_initialized:
            return step(given, tokens, cache, room)
        if room < T or (layer.is_initialized and int(layer.cumulative_length)):
            return "several tokens behind others"
    elif cache is None and keeps:
        cache = GROWING
    elif cache is not None and not fresh(cache):
        return "a cache that grows: cache_implementation='static' has steps replayed"
    if T < 2:
        return "one token and none before it"
    why = hidden_tokens(given.get("attention_mask"), given.get("position_ids"), T)
    return why or Replayable(tokens, cache, True, {})


def refused(
    router: RoutedLanguage, base: nn.Module, given: dict[str, Any], args: Any
) -> str | None:
    """Why no call like this is replayed; None: it may be."""
    tokens, config = given.get("input_ids"), getattr(base, "config", None)
    more = [
        name
        for name, value in given.items()
        if name not in (*USUAL, *IDLE) and value is not None and value is not False
    ]
    shown = said(config, "output_hidden_states") or said(config, "output_attentions")
    if len(args) > 1 or not isinstance(tokens, Tensor) or tokens.dim() != 2 or more or shown:
        return f"inputs or outputs beside tokens, mask, positions and cache {more}"
    if torch.is_grad_enabled():
        return "gradients"
    if router.frozen is not None:
        return "frozen units, under which a cache drops keys; thaw() to have passes replayed"
    if not router.unasked:  # hooks on controllers are looked for with those of other modules
        return "a pass that is drawn, observed or given its routes"
    if router.forced:
        return "a forced route"
    if type(router.policy) not in (Argmax, Budget, Conservative):
        return f"the policy {type(router.policy).__name__}"
    if not on_device(tokens):
        return f"a device without CUDA graphs, {tokens.device}"
    return None


def said(config: Any, name: str, default: Any = False) -> Any:
    """`getattr` without what transformers looks up around it, for which a device would wait."""
    try:
        return object.__getattribute__(config, name)
    except AttributeError:
        return default


def idle(hook: Any) -> bool:
    """Whether a hook is the patch's own, or one that transformers leaves and reads on demand."""
    of = getattr(hook, "func", hook)
    return (
        of in (keep_first, keep_hidden, require_answered)
        or getattr(of, "__module__", "") == output_capturing.__name__
    )


def on_device(tokens: Tensor) -> bool:
    """Whether there are CUDA graphs where the tokens are."""
    return tokens.is_cuda


def fresh(cache: Any) -> bool:
    """Whether a growing cache is empty, and of the usual kind."""
    if type(cache) is not DynamicCache or any(
        type(one) is not DynamicLayer for one in cache.layers
    ):
        return False
    return cache.get_seq_length() == 0


def step(given: dict[str, Any], tokens: Tensor, cache: Any, room: int) -> Replayable | str:
    """One token for each text behind a static cache."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    inputs: dict[str, Tensor] = {}
    if isinstance(mask, Tensor):
        if mask.dim() == 2:  # of the tokens so far, the new one among them
            mask = F.pad(mask.bool(), (0, room - mask.shape[1]))[:, None, None]
        if mask.shape[1:] != (1, 1, room) or mask.dtype != torch.bool:
            return "a mask of another shape"
        inputs["attention_mask"] = mask
    elif mask is not None:
        return "several masks"
    if positions is not None:
        inputs["position_ids"] = positions.expand(len(tokens), 1)
    return Replayable(tokens, cache, False, inputs)


def hidden_tokens(mask: Any, positions: Any, T: int) -> str | None:
    """Why a prompt is not one of whole texts from position 0; it waits for the device, once."""
    usual = []
    if isinstance(mask, Tensor):
        if mask.dim() == 2:
            usual.append(mask.bool().all())
        elif mask.dtype == torch.bool and mask.dim() == 4:
            at = torch.arange(mask.shape[3], device=mask.device)
            usual.append((mask == (at <= at[:T, None])).all())
        else:
            return "a mask of another kind"
    elif mask is not None:
        return "several masks"
    if positions is not None:
        usual.append((positions == torch.arange(T, device=positions.device)).all())
    plain = not usual or bool(torch.stack(usual).all())
    return None if plain else "padding, or positions of the caller's own, in a prompt"
