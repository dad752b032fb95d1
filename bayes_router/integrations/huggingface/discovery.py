"""Which attention layers a Hugging Face model has, and which are left out.

And whether it can be routed at all.
"""

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayes_router.attention.shapes import ExpertShape
from bayes_router.checks import require
from bayes_router.integrations.huggingface import falcon
from bayes_router.integrations.huggingface.interface import MASKS, watching
from bayes_router.integrations.patch.found import Found
from bayes_router.integrations.patch.offload import device_of, in_memory
from bayes_router.integrations.patch.settings import RouterConfig

PROBE_TOKENS = 8


def check_model(model: PreTrainedModel) -> str:
    """How the model attends now: sdpa or eager, or falcon (a wrapper of its own).

    Raises:
        ValueError: a model that cannot be routed, with the reason.
    """
    name = type(model).__name__
    _check_kind(model, name)
    if falcon.serves(model):
        return falcon.OWN
    require(
        model._can_set_attn_implementation(),
        "model",
        "an architecture of the attention interface of transformers 5 (GPT-2, Llama, Phi, Qwen, "
        "Gemma, ...), or Falcon",
        name,
        "its attention is written out inside the model: not served",
    )
    base: str = model.config._attn_implementation
    require(
        base in MASKS,
        "attn_implementation",
        "sdpa or eager",
        base,
        "call model.set_attn_implementation('sdpa') first",
    )
    upcast = base == "eager" and getattr(model.config, "reorder_and_upcast_attn", False)
    require(
        not upcast,
        "reorder_and_upcast_attn",
        "False under eager attention",
        True,
        "set attn_implementation='sdpa'",
    )
    return base


def _check_kind(model: PreTrainedModel, name: str) -> None:
    """Refuse a model without weights in memory, with quantised ones, or of another kind."""
    parameters = list(model.parameters())
    require(bool(parameters), "model", "a model with weights", name)
    require(
        in_memory(model),
        "model",
        "weights in memory",
        f"{name} on the meta device",
        "load them first",
    )
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    # GGUF weights are floats once loaded
    quantised = getattr(model, "is_quantized", False) and method != "gguf"
    require(
        not quantised,
        "model",
        "weights in float32, float64, bfloat16 or float16",
        f"{name} with quantised weights",
        "load it without quantization_config, or dequantise it first",
    )
    require(
        model.main_input_name == "input_ids",
        "model",
        "a model that reads input_ids",
        f"{name} reads {model.main_input_name}",
    )
    require(
        not model.config.is_encoder_decoder,
        "model",
        "a decoder or an encoder",
        f"{name}, an encoder-decoder",
        "not served",
    )


def find_layers(model: PreTrainedModel, settings: RouterConfig) -> list[Found]:
    """The attention layers that are to be routed, in the order in which the model runs them.

    The model is run once on a few tokens.
    """
    kind, (found, times) = type(model).__name__, _run(model, settings)
    require(
        bool(found),
        "model",
        "attention that the attention interface serves",
        kind,
        "none ran: not served",
    )
    for one in found:
        got = f"{kind}, whose {one.name} runs {times[one.module]} times"
        require(
            times[one.module] == 1,
            "model",
            "attention layers that run once a pass",
            got,
            "shared layers are not served",
        )
    left = left_out(model, found)
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        warnings.warn(
            f"{kind}: attention in {shown} ({len(left)} modules) did not run through the attention "
            f"interface on token ids "
            "alone: it is not routed and stays as it was",
            stacklevel=5,
        )
    chosen = range(len(found)) if settings.layers is None else settings.layers
    require(
        all(0 <= i < len(found) for i in chosen),
        "layers",
        f"indices of the {len(found)} attention layers",
        settings.layers,
    )
    routed = [found[i] for i in chosen]
    width = routed[0].width
    for one in routed:
        require(
            one.width == width, "model", f"one width of hidden states, {width}", one.width, one.name
        )
    return routed


def _run(
    model: PreTrainedModel, settings: RouterConfig
) -> tuple[list[Found], "Counter[nn.Module]"]:
    """Every attention module that ran on a few tokens, in its order, and how often it did."""
    names = {module: name for name, module in model.named_modules()}
    widths: dict[nn.Module, int] = {}
    calls: dict[nn.Module, Found] = {}
    times: Counter[nn.Module] = Counter()

    def observe(module: nn.Module, q: Tensor, k: Tensor, causal: bool, window: int | None) -> None:
        shape = ExpertShape(q.shape[1], q.shape[3], settings.window)
        own = window if window is None or causal else 2 * window - 1  # on both sides
        calls[module] = Found(
            module, names[module], shape, k.shape[1], widths.get(module, 0), causal, own
        )
        times[module] += 1

    def width(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            widths[module] = hidden.shape[-1]

    handles = [
        module.register_forward_pre_hook(width, with_kwargs=True) for module in model.modules()
    ]
    watching.observers += (observe,)
    try:
        probe(model)
    finally:
        watching.observers = watching.observers[:-1]
        for handle in handles:
            handle.remove()
    return list(calls.values()), times


def left_out(model: PreTrainedModel, found: list[Found]) -> list[str]:
    """Names of the attention modules that did not run there on a few tokens.

    A vision tower's, cross-attention, linear ones.
    """
    ran = {inner for one in found for inner in one.module.modules()}
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if (
            type(module).__name__.endswith("Attention")
            and not inside
            and not any(inner in ran for inner in module.modules())
        ):
            names.append(name)
    return names


@torch.no_grad()
def probe(model: PreTrainedModel) -> Tensor:
    """The first output of the model on a few tokens, in evaluation mode.

    Mode and random state are left as they were.
    """
    device = device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    tokens = (
        torch.arange(3, 3 + PROBE_TOKENS, device=device)[None]
        % model.config.get_text_config().vocab_size
    )
    model.eval()
    try:
        out = model(input_ids=tokens, return_dict=True)
    finally:
        for module, mode in modes:
            module.training = mode
    first: Tensor = out[0]
    return first
