"""Patch a Hugging Face model.

By the attention interface of transformers 5, so that every architecture it serves is served.

The interface hands over queries, keys and values after projection, rotary positions and the KV
cache; a forward pre-hook hands over the hidden state that the controller reads. With every token on
`full` the model's own kernel is called with its own arguments, so outputs are bit for bit the
original's.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayes_router.integrations.huggingface import falcon
from bayes_router.integrations.huggingface.aside import Aside, keep_first
from bayes_router.integrations.huggingface.discovery import check_model, find_layers, probe
from bayes_router.integrations.huggingface.interface import MASKS, keep_hidden, require_answered
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.huggingface.registered import install
from bayes_router.integrations.patch.binding import BINDING, Binding
from bayes_router.integrations.patch.settings import RouterConfig


def patch_pretrained(model: PreTrainedModel, settings: RouterConfig) -> RoutedPretrained:
    """Route the attention layers of `model`; see `bayes_router.patch`."""
    base = check_model(model)
    restore = falcon.install(model) if base == falcon.OWN else install(model, base)
    router = None
    try:
        found = find_layers(model, settings)
        router = RoutedPretrained(model, found, settings)
        router.undo += restore
        router.bind()
        set_hooks(router, base)
        verify_patch(router)
    except BaseException:
        for undo in restore if router is None else [router.unpatch]:
            undo()
        raise
    return router


def set_hooks(router: RoutedPretrained, base: str) -> None:
    """Before a layer's call its hidden states are kept, after it nothing may be left of them."""
    configs = {id(one.module.config): one.module.config for one in router.found}
    aside = Aside(router, base, [*configs.values()] if base in MASKS else [])
    for one in router.found:
        binding: Binding = getattr(one.module, BINDING)
        keep = partial(keep_hidden, binding)
        if binding.index == 0:
            keep = partial(keep_first, aside, binding)
        before = one.module.register_forward_pre_hook(keep, with_kwargs=True)
        after = one.module.register_forward_hook(partial(require_answered, binding))
        if binding.index > 0:
            aside.add(one.module._forward_pre_hooks, before.id)
            aside.add(one.module._forward_hooks, after.id)
        router.undo += [before.remove, after.remove]
    stack = router.model.base_model
    assert isinstance(stack, nn.Module)
    within = set(stack.modules())
    ends = aside.watch(stack if all(one.module in within for one in router.found) else router.model)
    router.undo += [*(end.remove for end in ends), aside.back]


def verify_patch(router: RoutedPretrained) -> None:
    """Compare the patched model, every token on full attention, with the original on a few tokens.

    Try a mixed route too.

    Raises:
        ValueError: they differ, a layer was not routed, or the mixed route cannot be executed.
    """
    model = router.model
    assert isinstance(model, PreTrainedModel)
    seen: set[int] = set()

    def full(layer: int, hidden: Tensor) -> int:
        seen.add(layer)
        return router.experts.index("full")

    def mixed(layer: int, hidden: Tensor) -> Tensor:
        return (torch.arange(hidden.shape[1], device=hidden.device) % len(router.experts)).expand(
            hidden.shape[:2]
        )

    try:
        with router.routed_by(mixed):
            probe(model)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"model: expected attention that can be cut by query and key; {type(model).__name__} "
            f"fails when its tokens are "
            f"routed differently: {error}; this architecture is not served"
        ) from error
    with router.routed_by(full):
        routed = probe(model)
    bindings = [(one.module, one.module.__dict__.pop(BINDING)) for one in router.found]
    original = probe(model)
    for module, binding in bindings:
        setattr(module, BINDING, binding)
    if len(seen) != len(router.found) or not torch.equal(routed, original):
        raise ValueError(
            f"model: expected outputs of {type(model).__name__} unchanged by a patch with every "
            f"token on full attention; "
            f"they differ, or a layer was not reached ({len(seen)} of {len(router.found)}); this "
            f"architecture is not served"
        )
