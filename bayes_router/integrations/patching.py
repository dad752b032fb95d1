"""`patch` and `load_patch`: one door for every kind of model.

What a model needs is imported when it comes.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack, overload

import torch
from torch import nn

from bayes_router.checks import require
from bayes_router.config import PriorConfig
from bayes_router.hub import folder_of
from bayes_router.integrations.patch.binding import router_of
from bayes_router.integrations.patch.given import check_weights, unwrapped
from bayes_router.integrations.patch.routed import RoutedModel
from bayes_router.integrations.patch.saving import (
    load_weights,
    read_fit,
    read_settings,
    saved_frozen,
)
from bayes_router.integrations.patch.settings import RouterConfig
from bayes_router.integrations.patch.shipped import folder_of as shipped_or
from bayes_router.routing.policy import Policy, check_policy
from bayes_router.routing.saving import load_evidence, load_risk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bayes_router.integrations.huggingface.model import RoutedPretrained
    from bayes_router.integrations.torch_model import RoutedTorch

TorchAttention: TypeAlias = (
    nn.MultiheadAttention
    | nn.TransformerEncoder
    | nn.TransformerEncoderLayer
    | nn.TransformerDecoder
    | nn.TransformerDecoderLayer
)
"""Modules of torch whose self-attention is routed."""


class PatchOptions(TypedDict, total=False):
    """What `patch` can be told, as a type checker reads it."""

    config: RouterConfig | None
    window: int
    experts: Sequence[str]
    route_by: str
    layers: Sequence[int] | None
    sinks: int
    prior: PriorConfig | None
    policy: Policy | None
    context: int
    controller_hidden: int
    concentration_floor: float
    graphs: bool


@overload
def patch(model: "PreTrainedModel", **options: Unpack[PatchOptions]) -> "RoutedPretrained": ...
@overload
def patch(model: TorchAttention, **options: Unpack[PatchOptions]) -> "RoutedTorch": ...  # type: ignore
@overload
def patch(  # type: ignore
    model: nn.Module, **options: Unpack[PatchOptions]
) -> "RoutedPretrained | RoutedTorch": ...


@torch.inference_mode(False)  # what is made here may be trained later
def patch(
    model: nn.Module,
    *,
    config: RouterConfig | None = None,
    window: int = 256,
    experts: Sequence[str] = ("full", "mapped", "local"),
    route_by: str = "layer",
    layers: Sequence[int] | None = None,
    sinks: int = 0,
    prior: PriorConfig | None = None,
    policy: Policy | None = None,
    context: int = 1024,
    controller_hidden: int = 64,
    concentration_floor: float = 0.01,
    graphs: bool = False,
) -> Any:
    """Route the attention of a pretrained model in place, its weights kept.

    `unpatch()` of the result takes it back.

    Unfitted, in evaluation mode, every token takes `full` attention and the outputs are the
    original's; training mode draws routes. Patching twice alike gives the same object. Attention
    weights (`output_attentions`, or `need_weights`, the default of a bare `nn.MultiheadAttention`)
    are the original's where every token is on `full`, and refused elsewhere.

    Args:
        model: a Hugging Face model of the attention interface (transformers 5) or Falcon, also
            inside a wrapper (PEFT, torch.compile, DistributedDataParallel, a module of your own),
            which is used on as it was; or `nn.TransformerEncoder`, `nn.TransformerDecoder`, one of
            their layers, or `nn.MultiheadAttention` (self-attention alone is routed, what is not is
            named in a warning).
        config: all settings in one, as `RouterConfig.from_pretrained` reads them; none of those
            below beside it but `policy`.
        window: keys that `local` sees, the token itself included.
        experts: of full, mapped, local, gated; `full` must be among them.
        route_by: what chooses an expert for a token: `layer` (all heads together), `kv_head` (each
            key and value head, with the query heads that share it) or `head` (each query head).
        layers: indices of the attention layers to route, in the order in which the model runs them;
            None: all.
        sinks: first tokens that `local` sees beside its window; about 4 for decoders, which park
            attention there.
        prior: of `fit`.
        policy: from posterior to route under HARD; the largest posterior mean by default.
        context: tokens at which costs are compared, where the prior's cost model asks; a layer
            whose own window is shorter pays for that window.
        controller_hidden: hidden width of each layer's controller; 0 for a linear one.
        concentration_floor: least concentration of the posterior.
        graphs: on a GPU, replay the model's own calls from CUDA graphs, see
            `RoutedPretrained.graphs`; of this process, no part of what is saved.

    Returns:
        A `RoutedPretrained` or a `RoutedTorch`.

    Raises:
        ValueError: settings or a model that cannot be routed, named, with the reason.

    Warns:
        UserWarning: some attention is not routed: a vision tower's, cross-attention.
    """
    model = unwrapped(model)
    check_weights(model)
    settings = RouterConfig(
        window=window,
        experts=experts if isinstance(experts, str) else tuple(experts),  # type: ignore[arg-type]
        route_by=route_by,
        layers=None if layers is None else tuple(layers),
        sinks=sinks,
        prior=RouterConfig().prior if prior is None else prior,
        context=context,
        controller_hidden=controller_hidden,
        concentration_floor=concentration_floor,
    )
    settings = _alone(config, settings)
    if policy is not None:
        check_policy(policy)
    with _unpatched_if_refused(model, settings) as router:
        if policy is not None:
            router.policy = policy
        if graphs:
            router.graphs = True
    return router


def _alone(config: RouterConfig | None, settings: RouterConfig) -> RouterConfig:
    """All settings in one, where they are given so: then none stand beside them."""
    if config is None:
        return settings
    require(isinstance(config, RouterConfig), "config", "a RouterConfig", type(config).__name__)
    fix = "put the others into it (dataclasses.replace)"
    require(settings == RouterConfig(), "config", "no settings beside it", settings, fix)
    return config


@contextmanager
def _unpatched_if_refused(model: nn.Module, settings: RouterConfig) -> Iterator[Any]:
    """The model patched; on a ValueError a patch that was not there before comes off again."""
    known = existing(model, settings)
    router = known or _patch(model, settings)
    try:
        yield router
    except ValueError:
        if known is None:
            router.unpatch()
        raise


@overload
def load_patch(model: "PreTrainedModel", folder: Path | str) -> "RoutedPretrained": ...
@overload
def load_patch(model: TorchAttention, folder: Path | str) -> "RoutedTorch": ...  # type: ignore
@overload
def load_patch(model: nn.Module, folder: Path | str) -> "RoutedPretrained | RoutedTorch": ...  # type: ignore
@torch.inference_mode(False)
def load_patch(model: nn.Module, folder: Path | str) -> Any:
    """Patch `model` as it was when `save` wrote `folder`.

    Settings, controllers, experts, policy and held-out text.

    A model that is patched alike already is filled from the folder.

    Args:
        model: the one that the patch was made for, in any precision.
        folder: where the patch was saved, or the name of one that comes with the package:
            `smollm2-135m`, `smollm2-135m-range` (budgets from 0.15 on, 2048 tokens and more), and
            of before `smollm2-135m-teacher` and `smollm2-135m-window256`, which observed the
            unpatched model alone, and `smollm2-135m-text`, the text alone; for
            SmolLM2-135M-Instruct from its Q4_1 GGUF file. A card lies beside each
            (`bayes_router/patches/NAME/README.md`).

    Raises:
        ValueError: the folder is no saved patch or is damaged, or was made for another model.
    """
    model = unwrapped(model)
    check_weights(model)
    folder = shipped_or(folder)
    settings, policy = read_settings(model, folder)
    with _unpatched_if_refused(model, settings) as router:
        load_weights(router, folder)
        router.fitted, held_out = read_fit(folder, router.config.vocab_size)
        evidence = load_evidence(Path(folder), len(router.layers), router.found[0].width)
        risk = load_risk(Path(folder))
        frozen = saved_frozen(
            folder, len(router.layers), router.config.num_units, len(router.experts)
        )
    router.policy, router.held_out = policy, held_out or router.held_out
    router.controller.evidence, router.controller.risk = evidence, risk
    router.frozen = frozen
    return router


class Router:
    """Routers as Hugging Face's models are loaded.

    What comes is a `RoutedPretrained` or a `RoutedTorch`.
    """

    @staticmethod
    def from_pretrained(
        model: nn.Module,
        folder_or_name: Path | str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Any:
        """`load_patch` from a folder, which asks nobody, or from a repository of the hub.

        Args:
            model: what the router was fitted for.
            folder_or_name: of `save_pretrained`; or OWNER/REPOSITORY, which is kept in the hub's
                cache.
            revision: branch, tag or commit of a repository.
            local_files_only: of a repository: take what the cache has and ask nobody (also
                HF_HUB_OFFLINE=1).

        Raises:
            ValueError: there is no such folder or repository, or it was made for another model.
        """
        return load_patch(model, folder_of(folder_or_name, revision, local_files_only))


def _patch(model: nn.Module, settings: RouterConfig) -> RoutedModel:
    transformers = sys.modules.get("transformers")  # its models cannot exist without it
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        version = int(transformers.__version__.split(".")[0])
        require(
            version >= 5,
            "transformers",
            "version 5 or later",
            transformers.__version__,
            "pip install 'transformers>=5'",
        )
        from bayes_router.integrations.huggingface.patching import patch_pretrained

        return patch_pretrained(model, settings)
    from bayes_router.integrations.torch_attention import patch_torch

    return patch_torch(model, settings)


def existing(model: nn.Module, settings: RouterConfig) -> RoutedModel | None:
    """The router of a model that is patched already, if it was patched alike.

    Raises:
        ValueError: it was patched with other settings.
    """
    router = router_of(model)
    if router is None:
        return None
    assert isinstance(router, RoutedModel)
    if router.model is not model or router.settings != settings:
        raise ValueError(
            f"model: expected one that is not patched, or was patched alike; it is, with "
            f"{router.settings}; "
            "call unpatch() on what patch returned first"
        )
    return router
