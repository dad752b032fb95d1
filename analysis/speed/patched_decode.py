"""A step of decoding, as `analysis.speed.patched` reads it."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from analysis.speed.patched_model import VOCABULARY, routed, send
from analysis.speed.patched_turns import Models, Timed, Turns, only
from bayes_router.integrations.huggingface.graphs import Graphs, without_mask

LENGTHS = {1: (8192, 32_768)}
"""Keys that a step is read behind, by the number of texts."""
LONGEST = (32_768,)
"""Of any other number."""


class Store(DynamicLayer):
    """Keys and values that a step writes into and does not copy.

    Every step is the one behind the first `length`.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int):
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer`."""
        stop = self.length + 1
        self.keys[:, :, self.length : stop], self.values[:, :, self.length : stop] = (
            key_states,
            value_states,
        )
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        """See `DynamicLayer`."""
        return self.length


def decode(bench: Turns, models: Models, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """One token for each of `batch` texts behind `context` keys."""
    (plain, model), device, room, share = models, bench.device, 64, 0.1
    unit, context, batch = facts["unit"], facts["context"], facts["batch"]
    router = routed(model, unit)
    ours = Graphs(model, context + room, batch)
    config = model.config
    like = torch.empty(
        batch,
        config.num_key_value_heads,
        1,
        config.hidden_size // config.num_attention_heads,
        device=device,
        dtype=torch.bfloat16,
    )
    rivals = Graphs(plain, context + room, batch)
    rivals.cache = ours.cache  # the same keys, and the same memory
    store = DynamicCache()
    for layer in ours.cache.layers:
        layer.lazy_initialization(like, like)
        layer.keys.normal_()
        layer.values.normal_()
        store.layers.append(Store(layer.keys, layer.values, context))
    token = torch.randint(VOCABULARY, (batch, 1), device=device)

    def again(graphs: Graphs) -> object:
        for layer in ours.cache.layers:
            layer.cumulative_length.fill_(context)
        graphs.length = context
        return graphs.step(token)

    def eager(what: LlamaForCausalLM, backend: SDPBackend | None = None) -> object:
        with only(backend):
            return what(token, past_key_values=store, use_cache=True)

    executed = send(router, share, partial(eager, model))
    with without_mask(plain):
        exactly = replayed(partial(eager, plain, SDPBackend.FLASH_ATTENTION))
    again(ours)  # captured by hand, before the setting captures its own
    router.graphs = True
    replay, cache = router.replay, ours.cache

    def setting(on: bool) -> None:
        router.replay = replay if on else None
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    def called() -> object:
        return model(token, past_key_values=cache, use_cache=True)

    off = partial(setting, False)
    contenders = {
        "floor: flash, graph": Timed(1.0, exactly),
        "unpatched, flash": Timed(1.0, partial(eager, plain, SDPBackend.FLASH_ATTENTION)),
        "unpatched, static cache, graph": Timed(1.0, partial(again, rivals)),
        f"routed {share:g}": Timed(executed, partial(eager, model), off),
        f"routed {share:g}, static cache, graph": Timed(executed, partial(again, ours), off),
        f"routed {share:g}, static cache, graphs=True": Timed(
            executed, called, partial(setting, True)
        ),
    }
    bench.group(facts, contenders)
    assert router.last.replayed, router.last.as_called
    router.replay, router.graphs = replay, False  # or its keys would wait for the collector
    router.unpatch()


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The same from a CUDA graph: of a step, one that serves this number of keys alone."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
