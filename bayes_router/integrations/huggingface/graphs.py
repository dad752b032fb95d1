"""A causal language model of transformers whose passes are replayed from CUDA graphs, patched or
not.

Without launches on the host a short pass takes the time of its kernels. A prefill is captured once
for each bucket of lengths: the text is padded on the right to a multiple of `bucket`, where no real
token sees it, and its keys go to a static cache. A step of decoding is captured once.

Nothing in a patched pass waits for the device: see `calls.fused_router` and `calls.step`. What is
captured is how the model stands: after other weights, another policy or budget, a `force` or an
`unpatch`, make another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from bayes_router.checks import require

WARM_UP = 2  # passes before a capture: kernels are compiled, and what waits once has waited


class Graphs:
    """Prefill and greedy or sampled steps of one model, as CUDA graphs of static shapes.

    Attributes:
        cache: the static cache, in which padding is overwritten by the steps that follow.
        length: tokens that it holds.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, batch: int = 1, bucket: int = 1024):
        """Of `batch` texts of one length, of at most `capacity` tokens with what is generated.

        Raises:
            ValueError: the model is not on a CUDA device, or trains.
        """
        require(
            model.device.type == "cuda",
            "model",
            "one on a CUDA device",
            str(model.device),
            "model.cuda()",
        )
        require(
            not model.training, "model", "one in evaluation mode", "training mode", "model.eval()"
        )
        for name, value in (("capacity", capacity), ("batch", batch), ("bucket", bucket)):
            require(value >= 1, name, "at least 1", value)
        self.model, self.capacity, self.batch, self.bucket, self.length = (
            model,
            capacity,
            batch,
            bucket,
            0,
        )
        config = model.config.get_text_config()
        self.cache = StaticCache(config=config, max_cache_len=capacity)
        plain = all(type(layer) is StaticLayer for layer in self.cache.layers)
        require(plain, "model", "attention over all keys in every layer", "layers of another kind")
        self._pool = torch.cuda.graph_pool_handle()
        self._prefills: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self._step: tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None = None

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Read texts int64 [B, T] from the start: the logits [B, V] after the last token, valid
        until the next call.

        Raises:
            ValueError: another batch than was said, or more tokens than fit.
        """
        B, T = tokens.shape
        require(self.batch == B, "tokens", f"{self.batch} texts", B)
        require(1 < T <= self.capacity, "tokens", f"2 to {self.capacity} tokens, the capacity", T)
        padded = min(-(-T // self.bucket) * self.bucket, self.capacity)
        if padded not in self._prefills:
            self._prefills[padded] = self._capture_prefill(padded)
        graph, given, last, logits = self._prefills[padded]
        given[:, :T].copy_(tokens)
        last.fill_(T - 1)
        graph.replay()
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(T)
        self.length = T
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each text, int64 [B, 1]: the logits [B, V] after it, valid until the
        next call.

        Raises:
            ValueError: nothing was read yet, or the cache is full.
        """
        require(
            0 < self.length < self.capacity,
            "step",
            f"1 to {self.capacity - 1} tokens in the cache",
            self.length,
        )
        if self._step is None:
            self._step = self._capture_step()
        graph, given, logits = self._step
        given.copy_(tokens)
        graph.replay()
        self.length += 1
        return logits

    def generate(self, tokens: Tensor, new: int) -> Tensor:
        """The `new` most likely tokens behind texts int64 [B, T], one by one: int64 [B, new]."""
        found = [self.prefill(tokens).argmax(-1, keepdim=True)]
        while len(found) < new:
            found.append(self.step(found[-1]).argmax(-1, keepdim=True))
        return torch.cat(found, 1)

    def _capture_prefill(self, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        given = torch.zeros(self.batch, length, dtype=torch.int64, device=self.model.device)
        last = torch.zeros(1, dtype=torch.int64, device=self.model.device)

        def run() -> Tensor:
            cache = DynamicCache(config=self.model.config.get_text_config())
            with without_mask(self.model):  # else one is written out while a graph is captured
                out = self.model.base_model(given, past_key_values=cache, use_cache=True)
            hidden = out.last_hidden_state
            for mine, new in zip(self.cache.layers, cache.layers, strict=True):
                if not mine.is_initialized:
                    mine.lazy_initialization(new.keys, new.values)
                mine.keys[:, :, :length].copy_(new.keys)
                mine.values[:, :, :length].copy_(new.values)
            head: Any = self.model.get_output_embeddings()
            logits: Tensor = head(hidden.index_select(1, last))[:, 0]
            return logits

        graph, logits = self._capture(run)
        return graph, given, last, logits

    def _capture_step(self) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = torch.zeros(self.batch, 1, dtype=torch.int64, device=self.model.device)

        def run() -> Tensor:
            out: Tensor = self.model(given, past_key_values=self.cache, use_cache=True).logits[
                :, -1
            ]
            return out

        held = [layer.cumulative_length.clone() for layer in self.cache.layers]

        def back() -> None:
            for layer, count in zip(self.cache.layers, held, strict=True):
                layer.cumulative_length.copy_(count)

        graph, logits = self._capture(run, back)
        return graph, given, logits

    def _capture(
        self, run: Callable[[], Tensor], back: Callable[[], object] = lambda: None
    ) -> tuple[Any, Tensor]:
        """A graph of `run` and what it leaves.

        `back` undoes what a pass that only warms up has counted.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
                back()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = run()
        back()
        return graph, logits


@contextmanager
def without_mask(model: PreTrainedModel) -> Iterator[None]:
    """No mask is made for a model of causal layers: their kernels know the causal order by
    themselves.
    """
    name = model.config.get_text_config()._attn_implementation
    ALL_MASK_ATTENTION_FUNCTIONS[name] = no_mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[name]


def no_mask(*args: Any, **kwargs: Any) -> None:
    """In the place of a function that makes masks."""
