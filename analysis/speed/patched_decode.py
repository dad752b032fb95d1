"""A step of decoding, as `analysis.speed.patched` reads it."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from analysis.speed.patched_model import SINKS, VOCABULARY, WINDOW, routed, send
from analysis.speed.patched_turns import Models, Timed, Turns, only, replayed, whole
from bayes_router.integrations.huggingface.graphs import Graphs, knows_its_keys, without_mask
from bayes_router.integrations.huggingface.model import RoutedPretrained

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

    def back(replay: Any = None) -> None:
        """Every step is the one behind `context` keys; by the setting where it replays."""
        router.replay, ours.length, rivals.length = replay, context, context
        for layer in ours.cache.layers:
            layer.cumulative_length.fill_(context)

    def eager(what: LlamaForCausalLM, backend: SDPBackend | None = None) -> object:
        with only(backend):
            return what(token, past_key_values=store, use_cache=True)

    executed = send(router, share, partial(eager, model))
    # of this pass: what a captured one leaves is memory of its graph
    rate = memory_rate(device)
    weights = sum(2 * p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    bounds: dict[str, Timed] = {}
    if rate is not None:
        least = bytes_read(router, weights, context) / rate * 1e3
        bounds[f"bound: bytes at {rate / 1e9:.0f} GB/s"] = Timed(executed, lambda: least)
    with without_mask(plain):
        exactly = replayed(partial(eager, plain, SDPBackend.FLASH_ATTENTION))
    back()
    ours.step(token)  # captured by hand, before the setting captures its own
    static, compiled = "static cache, graph", dict[str, Timed]()
    if (unit, batch) == (args.units[-1], max(args.batches)):
        compiled = compiled_steps("unpatched", 1.0, plain, token, rivals, back)
        compiled |= compiled_steps(f"routed {share:g}", executed, model, token, ours, back)
    router.graphs = True
    replay = router.replay
    by_setting = partial(model, token, past_key_values=ours.cache, use_cache=True)
    contenders = {
        "floor: flash, graph": Timed(1.0, exactly),
        "unpatched, flash": Timed(1.0, partial(eager, plain, SDPBackend.FLASH_ATTENTION)),
        f"unpatched, {static}": Timed(1.0, partial(rivals.step, token), back),
        f"routed {share:g}": Timed(executed, partial(eager, model), back),
        f"routed {share:g}, {static}": Timed(executed, partial(ours.step, token), back),
    }
    contenders |= compiled
    last = Timed(executed, by_setting, partial(back, replay))
    contenders[f"routed {share:g}, {static}s=True"] = last
    bench.group(facts, contenders, bounds)
    assert router.last.replayed, router.last.as_called
    router.replay, router.graphs = replay, False  # or its keys would wait for the collector
    router.unpatch()


def compiled_steps(
    name: str, on_full: float, model: LlamaForCausalLM, token: Tensor, graphs: Graphs,
    back: Callable[[], object],
) -> dict[str, Timed]:  # fmt: skip
    """A step by torch.compile, captured in a graph; a patch's layers need no mask for it."""
    compiled, hides = whole(model), None if knows_its_keys(model) else nullcontext()

    def step() -> object:
        with hides or without_mask(model):
            return compiled(token, past_key_values=graphs.cache, use_cache=True)

    try:
        back()
        captured = Timed(on_full, replayed(step, back), back)
    except RuntimeError as error:
        print(f"{name}, compiled: left out, {error}"[:300], flush=True)
        return {}
    return {f"{name}, compiled, static cache, graph": captured}


def memory_rate(device: torch.device) -> float | None:
    """Bytes a second that the card's memory can be read at; None: it does not say."""
    facts = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    clock, width = (getattr(facts, f"memory_{x}", 0) for x in ("clock_rate", "bus_width"))
    return 2 * clock * 1e3 * width / 8 or None


def bytes_read(router: RoutedPretrained, weights: int, context: int) -> int:
    """What the last step had to read: weights, and of each key head of a text all keys and values
    where one of its query heads took full, else its window and sinks.
    """
    shape, kv_heads, keys = router.found[0].shape, router.found[0].kv_heads, 0
    for route in router.last.executed.values():  # [B, 1, R]
        of_keys = route[:, 0].repeat_interleave(max(kv_heads // route.shape[2], 1), 1)
        on_full = (of_keys.unflatten(1, (kv_heads, -1)) == 0).any(-1)
        each = torch.where(on_full, context + 1, min(WINDOW + SINKS, context + 1))
        keys += int(each.sum())
    return weights + keys * 2 * shape.head_dim * 2
