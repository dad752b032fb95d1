"""What is given to be patched: a model, also inside of a wrapper, of floating-point weights."""

import re
import sys

import torch
from torch import nn

from bayes_router.checks import require


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside of a wrapper; anything else as it is.

    Raises:
        ValueError: there are several.
    """
    # its models cannot exist without it
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if kind is None or not isinstance(model, nn.Module) or isinstance(model, kind):
        return model
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        if isinstance(part, kind) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    require(
        len(found) < 2,
        "model",
        "one Hugging Face model",
        f"{type(model).__name__} with several, {', '.join(found)}",
        "patch each by itself",
    )
    return next(iter(found.values()), model)


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
QUANTISED = re.compile(
    r"^(torch(\.ao)?\.nn\.(\w+\.)*quantized|torchao|bitsandbytes|auto_gptq|gptqmodel|awq|hqq|(optimum\.)?quanto)\b"
)
"""Where modules and tensors live that keep integers behind the name, or the dtype, of floats."""


def check_weights(model: nn.Module) -> None:
    """See that `model` is a torch module whose weights are floating-point numbers.

    Raises:
        ValueError: it is none, or has quantised weights, also packed ones, which are no parameters.
    """
    require(
        isinstance(model, nn.Module),
        "model",
        "a torch module",
        model,
        "load it first: transformers.AutoModelForCausalLM.from_pretrained(...)",
    )
    kinds = [
        (name, type(part)) for name, part in (*model.named_modules(), *model.named_parameters())
    ]
    packed = [
        f"{name} ({kind.__module__}.{kind.__qualname__})"
        for name, kind in kinds
        if QUANTISED.match(kind.__module__)
    ]
    packed += [
        f"{name} ({p.dtype})" for name, p in model.named_parameters() if p.dtype not in FLOATS
    ]
    require(
        not packed,
        "model",
        "weights in float32, float64, bfloat16 or float16",
        f"{type(model).__name__} with quantised weights, {', '.join(packed[:1])}",
        "load it without quantization_config, or dequantise it first",
    )
