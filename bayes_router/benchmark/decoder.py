"""Decoding of the same tokens turn after turn, from a cache that holds a prompt."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bayes_router.benchmark.clock import captured
from bayes_router.checks import require
from bayes_router.timing import isolated_ms
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.network import RoutedTransformer
from bayes_router.types import RoutingMode

# tokens of a prompt that enter a cache at a time on CUDA; elsewhere all do, in one causal pass
# without a mask
PIECE = 4096
STEPS = 16  # tokens decoded in a turn


def lean_network(model: RoutedLanguageModel) -> RoutedTransformer:
    """The network with full attention as its only expert; its weights are the model's own."""
    with torch.device("meta"):
        network = RoutedTransformer(replace(model.config, experts=("full",)))
    weights = model.network.state_dict()
    network.load_state_dict({name: weights[name] for name in network.state_dict()}, assign=True)
    return network.eval()


def only_expert(layer: int, hidden: Tensor) -> int:
    """The route of a network with one expert."""
    return 0


class Decoder:
    """Decodes the same tokens turn after turn from a cache that holds a prompt.

    Args:
        model: the model.
        prompt: int64 [B, T].
        following: int64 [B, STEPS], read one at a time.
        way: None for the model's routes, "full" for force="full", "alone" for the network with
            nothing but full attention.
    """

    def __init__(
        self, model: RoutedLanguageModel, prompt: Tensor, following: Tensor, way: str | None
    ):
        self.model, self.following, self.way = model, following, way
        self.token = following[:, :1].clone()  # where a captured step reads its input
        batch, capacity = len(prompt), prompt.shape[1] + following.shape[1]
        self.network = lean_network(model) if way == "alone" else model.network
        self.cache = self.network.new_cache(batch, capacity)
        for part in prompt.split(PIECE if prompt.device.type == "cuda" else prompt.shape[1], 1):
            self.read(part)
        self.length = prompt.shape[1]
        self.states = [
            {i: state.clone() for i, state in layer.states.items()} for layer in self.cache.layers
        ]
        self.run: Callable[[], object] = self.step

    def read(self, tokens: Tensor) -> Tensor:
        """Read tokens [B, T] into the cache: logits [B, 1, V]."""
        if self.way == "alone":
            logits: Tensor = self.network(tokens, only_expert, self.cache, last_only=True)
            return logits
        return self.model(
            tokens, RoutingMode.HARD, force=self.way, cache=self.cache, last_only=True
        ).logits

    def step(self) -> Tensor:
        """Read `token` into the cache."""
        return self.read(self.token)

    def rewind(self) -> None:
        """Forget all but the prompt."""
        for layer, states in zip(self.cache.layers, self.states, strict=True):
            layer.lengths.fill_(self.length)
            layer.longest = self.length
            for index, state in states.items():
                layer.states[index].copy_(state)

    @torch.no_grad()
    def turn(self, device: torch.device) -> float:
        """The milliseconds that decoding all of `following` takes."""
        self.rewind()

        def steps() -> None:
            for index in range(self.following.shape[1]):
                self.token.copy_(self.following[:, index : index + 1])
                self.run()

        return isolated_ms(steps, device)[1]

    @torch.no_grad()
    def routes(self) -> Tensor:
        """What `following` takes, [L, B, STEPS, R]."""
        self.rewind()
        found = [
            self.model(self.following[:, i : i + 1], RoutingMode.HARD, cache=self.cache).route
            for i in range(self.following.shape[1])
        ]
        return torch.cat(found, 2)

    def as_graph(self) -> "Decoder":
        """The same decoding with its step in a CUDA graph.

        The replayed step is found equal to the one that was recorded.

        Raises:
            RuntimeError: a step waits for the device, and cannot be recorded.
            ValueError: the replayed step gives other logits.
        """
        self.rewind()
        want = self.step().clone()
        twin = object.__new__(Decoder)
        twin.__dict__.update(self.__dict__)
        self.rewind()
        replay = captured(self.step)
        self.rewind()
        got = replay()
        assert isinstance(got, Tensor)
        error = float((got.double() - want.double()).norm() / want.double().norm())
        require(error < 2e-2, "graph", "the logits of the recorded step", f"others by {error:.1e}")
        twin.run = replay
        return twin
