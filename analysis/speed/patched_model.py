"""Patched models that are timed: random weights, and a share of tokens that takes full."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.patching import patch
from bayes_router.routing.controller import LayerController
from bayes_router.routing.posterior import inverse_softplus

WINDOW, SINKS, VOCABULARY = 1024, 4, 1024
SHAPES = {
    "llama-1b, 8 layers": (2048, 8192, 8, 32, 8),
    "smollm2-135m, 30 layers": (576, 1536, 30, 9, 3),
}


def build(
    shape: str,
    layers: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """Random weights, made where they stay: a GPU takes no time for it."""
    width, inner, depth, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131_072,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def routed(model: LlamaForCausalLM, unit: str) -> RoutedPretrained:
    """The model patched, with controllers of random weights; nothing is left to `full_up_to`."""
    router: RoutedPretrained = patch(
        model, window=WINDOW, sinks=SINKS, experts=("full", "local"), route_by=unit, context=32_768
    )
    router.full_up_to = 0
    torch.manual_seed(1)
    for layer in router.controller.layers:
        assert isinstance(layer, LayerController)
        layer.out.weight.data.normal_(std=0.5)
        layer.out.bias.data.zero_()
    return router


@torch.no_grad()
def send(router: RoutedPretrained, share: float, run: Callable[[], object]) -> float:
    """Move the biases until `share` of the tokens of `run()` take full, in every layer and unit.

    The share then executed.
    """
    for bias in biases(router):
        bias.zero_()
    for _ in range(2 if 0 < share < 1 else 1):
        run()
        for index, concentration in router.last.concentration.items():
            raw = inverse_softplus((concentration - router.controller.floor).clamp_min(1e-6))
            lead = (raw[..., 0] - raw[..., 1]).flatten(0, 1)  # [N, R]
            N, layers = len(lead), len(router.layers)
            # where there is one token
            of_layers = float(share > 0 and index < max(round(share * layers), 1))
            count = round((of_layers if N == 1 else share) * N)
            if count in (0, N):
                cut = torch.full_like(lead[0], 1e3 if not count else -1e3)
            else:
                order = lead.sort(0, descending=True).values
                cut = (order[count - 1] + order[count]) / 2
            layer = router.controller.layers[index]
            assert isinstance(layer, LayerController)
            layer.out.bias.view(-1, 2)[:, 0].sub_(cut)
    run()
    return statistics.mean(float((x == 0).float().mean()) for x in router.last.executed.values())


def biases(router: RoutedPretrained) -> list[Tensor]:
    """Of the controllers: what says how many tokens take full."""
    return [layer.get_parameter("out.bias").data for layer in router.controller.layers]


def stand(router: RoutedPretrained, state: list[Tensor], full_up_to: int) -> None:
    """Copy biases in place, and leave short texts to full or not."""
    router.full_up_to = full_up_to
    for bias, value in zip(biases(router), state, strict=True):
        bias.copy_(value)


def write_routes(path: Path, on_full: Tensor) -> None:
    """Keep which tokens took full, bool [L, T, R]."""
    np.savez(path, bits=np.packbits(on_full.numpy()), shape=np.array(on_full.shape))


def read_routes(path: Path) -> Tensor:
    """What `write_routes` kept."""
    kept = np.load(path)
    shape = tuple(int(n) for n in kept["shape"])
    bits = np.unpackbits(kept["bits"], count=int(np.prod(shape)))
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


@contextmanager
def executing(router: RoutedPretrained, on_full: Tensor) -> Iterator[Tensor]:
    """Every layer routes as it does, for as long as that takes, and then executes other routes.

    It gives the choices, which a graph that is captured meanwhile reads as long as it is replayed.

    `on_full` is bool [L, T, R]; the experts are full and local, in this order.
    """
    choices = (~on_full).long()
    own = router.route_call

    def route_call(index: int, hidden: Tensor, call: AttentionCall) -> Any:
        own(index, hidden, call)
        return choices[index][None]

    router.route_call = route_call  # type: ignore[method-assign]
    try:
        yield choices
    finally:
        del router.route_call
