"""Patch a Hugging Face model.

By the attention interface of transformers 5, so that every architecture it serves is served.

The interface hands over queries, keys and values after projection, rotary positions and the KV
cache; a forward pre-hook hands over the hidden state that the controller reads. With every token on
`full` the model's own kernel is called with its own arguments, so outputs are bit for bit the
original's.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bayes_router.integrations.huggingface import falcon
from bayes_router.integrations.huggingface.discovery import check_model, find_layers, probe
from bayes_router.integrations.huggingface.interface import keep_hidden, require_answered
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
        for one in found:
            binding: Binding = getattr(one.module, BINDING)
            handle = one.module.register_forward_pre_hook(
                partial(keep_hidden, binding), with_kwargs=True
            )
            answered = one.module.register_forward_hook(partial(require_answered, binding))
            router.undo += [handle.remove, answered.remove]
        verify_patch(router)
    except BaseException:
        for undo in restore if router is None else [router.unpatch]:
            undo()
        raise
    return router


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
