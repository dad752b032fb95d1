"""Passes of a causal language model of transformers, patched or not, replayed from CUDA graphs.

Without launches on the host a short pass takes the time of its kernels. A prefill is captured once
for each bucket of lengths: the text is padded on the right, where no real token sees it, and its
keys go to a static cache. A step of decoding is captured once.

Nothing in a patched pass waits for the device: see `calls.fused_router` and `calls.step`. What is
captured is how the model stands. The setting `graphs` of a patch (`replay`) sees when that changes;
whoever takes `Graphs` by hand makes another after other weights, another policy, a `force`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from bayes_router.checks import require
from bayes_router.integrations.patch.binding import router_of

OnePass = Callable[..., Any]
"""(tokens int64 [B, T], cache, last) -> what a pass leaves, see `Graphs`."""
WARM_UP = 2  # passes before a capture: kernels are compiled, and what waits once has waited


def require_cuda(model: Any) -> None:
    """ValueError where a model is not on a CUDA device."""
    fix = "model.cuda(), or leave graphs out"
    require(model.device.type == "cuda", "graphs", "a CUDA device", str(model.device), fix)


def logits_of(model: PreTrainedModel) -> OnePass:
    """Of one pass of a language model: the logits [B, V] of a token."""

    def call(tokens: Tensor, cache: Any, last: Tensor | int, **inputs: Any) -> Tensor:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=last, **inputs)
        logits: Tensor = out.logits[:, -1]
        return logits

    return call


class Read(DynamicLayer):
    """A layer of a cache that is filled once, with the very keys that the layer made."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer`, which would copy them behind nothing."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return key_states, value_states


Keys = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer [B, Hkv, T, Dh]."""


class Graphs:
    """Prefill and steps of one model, as CUDA graphs of static shapes.

    Attributes:
        cache: the static cache, in which padding is overwritten by the steps that follow.
        length: tokens that it holds.
        keys: without a static cache, those of the last prefill and of its padding, valid until the
            next.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        batch: int = 1,
        bucket: int = 1024,
        call: OnePass | None = None,
        stored: bool = True,
    ):
        """Of `batch` texts of one length, of at most `capacity` tokens with what is generated.

        `call(tokens, cache, last)` is one pass, `last` an int64 [1] with the place of the last
        token, or 1 in a step; by default the logits [B, V] after that token. Not `stored`: no keys
        are copied to a static cache, and there are no steps.

        Raises:
            ValueError: the model is not on a CUDA device, or trains.
        """
        require_cuda(model)
        require(
            not model.training, "model", "one in evaluation mode", "training mode", "model.eval()"
        )
        for name, value in (("capacity", capacity), ("batch", batch), ("bucket", bucket)):
            require(value >= 1, name, "at least 1", value)
        self.model, self.capacity, self.batch, self.bucket = model, capacity, batch, bucket
        self.length, self._call, self.stored = 0, call or logits_of(model), stored
        self.keys: Keys = []
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=capacity)
        plain = all(type(layer) is StaticLayer for layer in self.cache.layers)
        require(plain, "model", "attention over all keys in every layer", "layers of another kind")
        self._pool: Any = None
        self._prefills: dict[int, tuple[Any, Tensor, Tensor, tuple[Any, Keys]]] = {}
        self._lasts: dict[int, int] = {}  # tokens of the last prompt of each bucket
        self._steps: dict[tuple[str, ...], tuple[Any, dict[str, Tensor], Any]] = {}

    @torch.no_grad()
    def prefill(self, tokens: Tensor, padded: int | None = None) -> Any:
        """Read texts int64 [B, T] from the start: the logits [B, V] after the last token, valid
        until the next call.

        They are padded to a multiple of `bucket`, or to `padded` tokens.

        Raises:
            ValueError: another batch than was said, or more tokens than fit.
        """
        B, T = tokens.shape
        require(self.batch == B, "tokens", f"{self.batch} texts", B)
        require(1 < T <= self.capacity, "tokens", f"2 to {self.capacity} tokens, the capacity", T)
        padded = min(padded or -(-T // self.bucket) * self.bucket, self.capacity)
        if padded not in self._prefills:
            self._prefills[padded] = self._capture_prefill(padded)
        graph, given, last, (found, self.keys) = self._prefills[padded]
        (given if padded == T else given[:, :T]).copy_(tokens)
        if self._lasts.get(padded) != T:
            last.fill_(T - 1)
            self._lasts[padded] = T
        graph.replay()
        if self.stored:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(T)
            self.length = T
        return found

    def captured(self, padded: int) -> bool:
        """Whether a prompt of so many tokens, padding among them, is a replay by now."""
        return min(padded, self.capacity) in self._prefills

    def step(self, tokens: Tensor) -> Any:
        """Append one token to each text, int64 [B, 1]: the logits [B, V] after it, valid until the
        next call.

        Raises:
            ValueError: nothing was read yet, or the cache is full.
        """
        room = f"1 to {self.capacity - 1} tokens in the cache"
        require(0 < self.length < self.capacity, "step", room, self.length)
        found = self.append(tokens)
        self.length += 1
        return found

    @torch.no_grad()
    def append(self, tokens: Tensor, **inputs: Tensor) -> Any:
        """`step` behind what the cache holds, whoever wrote it; nobody looks whether there is room.

        `inputs` are the model's `attention_mask`, bool [B, 1, 1, capacity], and `position_ids`.
        """
        names = tuple(sorted(inputs))
        if names not in self._steps:
            self._steps[names] = self._capture_step(tokens, inputs)
        graph, given, found = self._steps[names]
        given["tokens"].copy_(tokens)
        for name, value in inputs.items():
            given[name].copy_(value)
        graph.replay()
        return found

    def generate(self, tokens: Tensor, new: int) -> Tensor:
        """The `new` most likely tokens behind texts int64 [B, T], one by one: int64 [B, new]."""
        found = [self.prefill(tokens).argmax(-1, keepdim=True)]
        while len(found) < new:
            found.append(self.step(found[-1]).argmax(-1, keepdim=True))
        return torch.cat(found, 1)

    def _capture_prefill(self, length: int) -> tuple[Any, Tensor, Tensor, tuple[Any, Keys]]:
        given = torch.zeros(self.batch, length, dtype=torch.int64, device=self.model.device)
        last = torch.zeros(1, dtype=torch.int64, device=self.model.device)

        def run() -> tuple[Any, Keys]:
            cache = DynamicCache(config=self.model.config.get_text_config())
            cache.layers = [Read() for _ in self.cache.layers]
            with without_mask(self.model):  # else one is written out while a graph is captured
                found = self._call(given, cache, last)
            if not self.stored:
                return found, [(layer.keys, layer.values) for layer in cache.layers]
            for mine, new in zip(self.cache.layers, cache.layers, strict=True):
                if not mine.is_initialized:
                    mine.lazy_initialization(new.keys, new.values)
                mine.keys[:, :, :length].copy_(new.keys)
                mine.values[:, :, :length].copy_(new.values)
            return found, []

        graph, found = self._capture(run)
        return graph, given, last, found

    def _capture_step(
        self, tokens: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor], Any]:
        given = {name: value.clone() for name, value in inputs.items()}
        tokens = tokens.clone()

        # nobody hides a token: a mask would say again what each layer knows, and be waited for
        plain = "attention_mask" not in given and knows_its_keys(self.model)

        def run() -> Any:
            with without_mask(self.model) if plain else nullcontext():
                return self._call(tokens, self.cache, 1, **given)

        held = [layer.cumulative_length.clone() for layer in self.cache.layers]

        def back() -> None:
            for layer, count in zip(self.cache.layers, held, strict=True):
                layer.cumulative_length.copy_(count)

        graph, found = self._capture(run, back)
        return graph, {"tokens": tokens, **given}, found

    def _capture(
        self, run: Callable[[], Any], back: Callable[[], object] = lambda: None
    ) -> tuple[Any, Any]:
        """A graph of `run` and what it leaves.

        `back` undoes what a pass that only warms up has counted.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
                back()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            found = run()
        back()
        return graph, found


def knows_its_keys(model: PreTrainedModel) -> bool:
    """Whether a step of every layer looks at how many keys a static cache holds, as those of a
    patch do, and needs no mask to hide the empty slots.
    """
    router, depth = router_of(model), model.config.get_text_config().num_hidden_layers
    if router is None or len(router.found) != depth:
        return False
    like = torch.empty(0, device=model.device, dtype=model.dtype)
    return all(router.steps_in_place(index, like) for index in range(depth))


@contextmanager
def without_mask(model: PreTrainedModel) -> Iterator[None]:
    """No mask is made for a model of causal layers: their kernels know the causal order by
    themselves.
    """
    name = model.config.get_text_config()._attn_implementation
    if ALL_MASK_ATTENTION_FUNCTIONS[name] is no_mask:  # inside another's
        yield
        return
    ALL_MASK_ATTENTION_FUNCTIONS[name] = no_mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[name]


def no_mask(*args: Any, **kwargs: Any) -> None:
    """In the place of a function that makes masks."""
