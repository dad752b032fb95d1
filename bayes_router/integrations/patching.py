"""`patch` and `load_patch`: one door for every kind of model; what a model needs is imported when it comes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bayes_router.config import PriorConfig, require
from bayes_router.integrations.routed import BINDING, PatchSettings, RoutedModel
from bayes_router.integrations.saving import load_fit, load_weights, read_settings
from bayes_router.routing.policy import Policy


def patch(
    model: nn.Module,
    *,
    window: int = 256,
    experts: Sequence[str] = ("full", "linear", "local"),
    layers: Sequence[int] | None = None,
    sinks: int = 0,
    prior: PriorConfig | None = None,
    policy: Policy | None = None,
    context: int = 1024,
    controller_hidden: int = 64,
    concentration_floor: float = 0.01,
) -> Any:
    """Route the attention of a pretrained model in place, its weights kept; `unpatch()` of the result takes it back.

    Unfitted, every token takes `full` attention and the outputs are the original's. Patching twice alike gives the same
    object.

    Args:
        model: a Hugging Face model of the attention interface (transformers 5) or Falcon; or `nn.TransformerEncoder`,
            `nn.TransformerDecoder`, one of their layers, or `nn.MultiheadAttention` (self-attention alone is routed).
        window: keys that `local` sees, the token itself included.
        experts: of full, linear, local, gated; `full` must be among them.
        layers: indices of the attention layers to route, in the order in which the model runs them; None: all.
        sinks: first tokens that `local` sees beside its window; about 4 for decoders, which park attention there.
        prior: of `fit`.
        policy: from posterior to route under HARD; the largest posterior mean by default.
        context: tokens at which costs are compared, where the prior's cost model asks.
        controller_hidden: hidden width of each layer's controller; 0 for a linear one.
        concentration_floor: least concentration of the posterior.

    Returns:
        A `RoutedPretrained` or a `RoutedTorch`.

    Raises:
        ValueError: settings or a model that cannot be routed, named, with the reason.
    """
    settings = PatchSettings(
        window=window,
        experts=tuple(experts),
        layers=None if layers is None else tuple(layers),
        sinks=sinks,
        prior=prior or PatchSettings().prior,
        context=context,
        controller_hidden=controller_hidden,
        concentration_floor=concentration_floor,
    )
    router = existing(model, settings) or _patch(model, settings)
    if policy is not None:
        router.policy = policy
    return router


def load_patch(model: nn.Module, folder: Path | str) -> Any:
    """Patch `model` as it was when `save` wrote `folder`: settings, controllers, experts, policy and held-out text.

    A model that is patched alike already is filled from the folder.

    Raises:
        ValueError: the folder is no saved patch or is damaged, or was made for another model.
    """
    settings, policy = read_settings(model, folder)
    known = existing(model, settings)
    router = known or _patch(model, settings)
    try:
        load_weights(router, folder)
        load_fit(router, folder)
    except ValueError:
        if known is None:
            router.unpatch()
        raise
    router.policy = policy
    return router


def _patch(model: nn.Module, settings: PatchSettings) -> RoutedModel:
    transformers = sys.modules.get("transformers")  # its models cannot exist without it
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        version = int(transformers.__version__.split(".")[0])
        require(version >= 5, "transformers", "version 5 or later", transformers.__version__, "pip install 'transformers>=5'")
        from bayes_router.integrations.huggingface import patch_pretrained

        return patch_pretrained(model, settings)
    from bayes_router.integrations.torch_attention import patch_torch

    return patch_torch(model, settings)


def existing(model: nn.Module, settings: PatchSettings) -> RoutedModel | None:
    """The router of a model that is patched already, if it was patched alike.

    Raises:
        ValueError: it was patched with other settings.
    """
    bindings = [getattr(module, BINDING) for module in model.modules() if hasattr(module, BINDING)]
    if not bindings:
        return None
    router: RoutedModel = bindings[0].router
    if router.model is not model or router.settings != settings:
        raise ValueError(
            f"model: expected one that is not patched, or was patched alike; it is, with {router.settings}; "
            "call unpatch() on what patch returned first"
        )
    return router
