"""The routed language model, as fitting, evaluation and diagnostics see it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from bayes_router.checks import choose, require
from bayes_router.config import ModelConfig
from bayes_router.integrations.patch.routed import RoutedModel
from bayes_router.integrations.patch.turned import Turned
from bayes_router.routing.force import Force, as_units, forced_route
from bayes_router.types import Route, RoutingMode, RoutingOutput


class RoutedLanguage(RoutedModel):
    """A patched Hugging Face model that speaks of tokens.

    It answers the calls of `RoutedLanguageModel` that evaluation makes.
    """

    @property
    def config(self) -> ModelConfig:
        """The routed layers in the terms of the project.

        With the model's vocabulary as it is now, for tokens may be added.
        """
        known: ModelConfig = self.__dict__["_config"]
        size = self.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        return known if size == known.vocab_size else replace(known, vocab_size=size)

    @config.setter
    def config(self, config: ModelConfig) -> None:
        self.__dict__["_config"] = config

    def forward(
        self,
        tokens: Tensor,
        mode: RoutingMode | str = RoutingMode.HARD,
        force: Force | None = None,
        **inputs: Any,
    ) -> RoutingOutput:
        """Logits and, for every layer, the posterior and the route that was executed.

        Args:
            tokens: int64 [B, T].
            mode: SAMPLE, MEAN or HARD.
            force: as in `RoutedModel.force`, for this pass alone.
            inputs: further inputs of the model, `attention_mask` among them.

        Raises:
            ValueError: the model has no language-modelling head.
        """
        chosen = choose("mode", mode, RoutingMode)
        forced = self._force if force is None else force
        sizes = len(self.layers), self.config.num_units
        answer = None if forced is None else forced_route(forced, self.experts, *sizes)
        concentrations, routes = [], []

        def route(layer: int, hidden: Tensor) -> Tensor | int:
            q = self.posterior(layer, hidden)
            executed = (
                self.decide(layer, q, chosen, hidden) if answer is None else answer(layer, hidden)
            )
            concentrations.append(q.concentration)
            routes.append(as_units(executed, q.concentration))
            self.note(layer, q, routes[-1])
            return executed

        with self.routed_by(route):
            logits = self.logits(tokens, **inputs)
        return RoutingOutput(logits, torch.stack(concentrations), torch.stack(routes))

    def logits(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """What the model says of tokens [B, T]: [B, T, V].

        Raises:
            ValueError: the model has no language-modelling head.
        """
        require(
            self.predicts,
            "model",
            "one with a language-modelling head",
            type(self.model).__name__,
            "load it by AutoModelForCausalLM or AutoModelForMaskedLM",
        )
        logits: Tensor = self.model(input_ids=tokens, **inputs).logits
        return logits

    def show_last(self, see: Callable[[Tensor], object]) -> RemovableHandle:
        """Show `see` what the head reads, [B, T, D], in every pass until the handle is removed.

        Raises as `logits`.
        """
        model = self.model
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        require(
            head is not None, "model", "one with a language-modelling head", type(model).__name__
        )
        assert head is not None
        return head.register_forward_pre_hook(lambda module, inputs: (see(inputs[0]), None)[1])

    @property
    def predicts(self) -> bool:
        """Whether the model has a head that speaks of tokens."""
        model = self.model
        return isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None

    @property
    def network(self) -> "Network":
        """What `RoutingModel` and the diagnostics want of a network."""
        return Network(self)

    @torch.no_grad()
    def unrouted(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of the model as it was before the patch."""
        full = self.experts.index("full")
        return self.network(tokens, lambda layer, hidden: full)

    @property
    def causal(self) -> bool:
        """Whether a token sees only what comes before it."""
        return all(one.causal for one in self.found)


class Unforced(Turned[RoutedLanguage]):
    """A patched model as a dial turns it, every window by itself."""

    def __call__(self, tokens: Tensor, mode: RoutingMode) -> RoutingOutput:
        """See `RoutedLanguage.forward`."""
        with self.router.forced_to(None):
            output: RoutingOutput = self.router(
                tokens, mode, **({"use_cache": False} if self.router.causal else {})
            )
        return output


class Network:
    """(tokens [B, T], route) -> logits [B, T, V] of a patched model.

    Every layer's route is answered by `route(layer, hidden)`.
    """

    def __init__(self, router: RoutedLanguage):
        self.router = router

    def __call__(self, tokens: Tensor, route: Route) -> Tensor:
        """See the class."""
        with self.router.routed_by(route):
            return self.router.logits(
                tokens, **({"use_cache": False} if self.router.causal else {})
            )

    @property
    def num_experts(self) -> int:
        """E: over how many a route is."""
        return len(self.router.experts)

    @property
    def num_units(self) -> int:
        """R: routing units of a layer."""
        return self.router.config.num_units

    @property
    def embed(self) -> torch.nn.Module:
        """Token ids to vectors."""
        model = self.router.model
        assert isinstance(model, PreTrainedModel)
        embedding: torch.nn.Module = model.get_input_embeddings()
        return embedding
