"""The attention function of a patched model as it is registered, and what torch.compile sees of it.

Which expert a token takes depends on the data, and so does what is computed; no traced graph can
look into that. So a layer's routed attention is one operator of the graph, with a fake that knows
its shape: nothing breaks the graph (`fullgraph=True`), and what stands around it is compiled.
Outside of torch.compile the layer is called as it stands; so it is where gradients are wanted, and
every expert is then computed and weighed, by one or nought where routes are hard.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from bayes_router.integrations.calls.tracing import traced
from bayes_router.integrations.huggingface.interface import (
    MASKS,
    NAME,
    PREFIX,
    original_kernel,
    routed_interface,
    watching,
)
from bayes_router.integrations.patch.binding import BINDING, Binding, Number
from bayes_router.integrations.patch.passes import Given

PASSED = ("scaling", "dropout", "is_causal", "sliding_window", "softcap", "s_aux", "position_bias")
"""What the kernels of transformers read beside tensors and mask, and the operator hands on."""
UNREAD = ("position_ids", "cache_position", "output_attentions", "use_cache")


# torch.compile's own CUDA graphs stop before it and go on after it: what a pass keeps outlives them
_UNSAFE: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op("bayes_router::attend_patched", mutates_args=(), **_UNSAFE)
def attend_patched(
    number: int,
    base: str,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],
    held: Optional[Tensor],
    scaling: Optional[float],
    dropout: Optional[float],
    is_causal: Optional[bool],
    sliding_window: Optional[int],
    softcap: Optional[float],
    s_aux: Optional[Tensor],
    position_bias: Optional[Tensor],
) -> Tensor:
    """[B, Tq, H, Dv]: what `routed_interface` answers to a call of the binding of this number.

    `held`: behind a static cache, how many tokens it has after the call, an integer [].
    """
    binding, new = Number.binding(number), query.shape[2]
    router = binding.router
    if held is None:
        given = Given(hidden)
    elif new == 1 and router.steps_in_place(binding.index, hidden):
        given = Given(hidden, held=held)
    else:
        given = Given(hidden, filled=int(held) - new)
    values = scaling, dropout, is_causal, sliding_window, softcap, s_aux, position_bias
    named = {name: x for name, x in zip(PASSED, values, strict=True) if x is not None}
    binding.give(given)
    module = router.found[binding.index].module
    return routed_interface(base, module, query, key, value, mask, **named)[0]


@attend_patched.register_fake
def _(
    number: int, base: str, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> Tensor:
    B, H, Tq, _ = query.shape
    return query.new_empty(B, Tq, H, value.shape[3])


def compiled_interface(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The registered attention function: `routed_interface`, as an operator while it is traced; of
    a pass that is left alone the layer's own.
    """
    binding = module.__dict__.get(BINDING)
    if not traced():
        left = binding is not None and binding.router.here.left is not None
        if left and not watching.observers:
            own = original_kernel(base, module)
            return own(module, query, key, value, attention_mask, **kwargs)
        return routed_interface(base, module, query, key, value, attention_mask, **kwargs)
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    if not (isinstance(binding, Binding) and binding.awaits and asked <= {*PASSED, *UNREAD}):
        return routed_interface(base, module, query, key, value, attention_mask, **kwargs)
    given = binding.take()
    named = (kwargs.get(name) for name in PASSED)
    out = attend_patched(
        binding.number.value, base, given.hidden, query, key, value, attention_mask, given.held,
        *named,
    )  # fmt: skip
    return out, None


def compiled_mask(base: str, *args: Any, **kwargs: Any) -> Any:
    """The registered maker of masks: none, while traced, where it would say no more than causal.

    transformers writes one out then, of all queries times all keys.
    """
    if not traced():
        return MASKS[base](*args, **kwargs)
    causal = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    whole = isinstance(kwargs.get("q_offset", 0), int) and not kwargs.get("kv_offset")
    plain = causal and whole and kwargs.get("attention_mask") is None
    if plain and not args and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return MASKS[base](*args, **kwargs)


for _base in MASKS:
    AttentionInterface.register(NAME.format(_base), partial(compiled_interface, _base))
    AttentionMaskInterface.register(NAME.format(_base), partial(compiled_mask, _base))


def install(model: PreTrainedModel, base: str) -> list[Callable[[], None]]:
    """Switch the model to the registered attention function; what undoes it.

    Each part keeps its own kernel: the language model may run sdpa and a vision tower eager.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    model.set_attn_implementation(NAME.format(base))
    for config, name in before:
        if config._attn_implementation == NAME.format(base) != NAME.format(name):
            config._attn_implementation_internal = NAME.format(name) if name in MASKS else name
    return [
        partial(switch_back, config, config._attn_implementation, name) for config, name in before
    ]


def switch_back(config: Any, installed: str, before: str) -> None:
    """Give a part of the model its own attention back, or the one that it was switched to since."""
    now = config._attn_implementation
    config._attn_implementation_internal = before if now == installed else now.removeprefix(PREFIX)
