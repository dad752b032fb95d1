"""The language model: the network, its controller, and the policy of its hard routes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayes_router.attention.decoding.model_cache import RoutedCache
from bayes_router.attention.experts.contract import Expert
from bayes_router.checks import choose
from bayes_router.config import Config, ModelConfig
from bayes_router.data.tokens import TokenSource
from bayes_router.hub import Sent, folder_of
from bayes_router.routing.controller import MetaController
from bayes_router.routing.force import Force, as_units, forced_route
from bayes_router.routing.guard import UNKNOWN, Guard, guarded
from bayes_router.routing.policy import Argmax, Policy, execute
from bayes_router.transformer import fused
from bayes_router.transformer.build import build_experts
from bayes_router.transformer.freezing import Freezing, freeze_model
from bayes_router.transformer.frozen import Frozen, posterior, short_by_layer
from bayes_router.transformer.network import RoutedTransformer
from bayes_router.transformer.padding import real_tokens
from bayes_router.transformer.pretrained import load_model, save_model
from bayes_router.types import RoutingMode, RoutingOutput


class RoutedLanguageModel(nn.Module, Sent):
    """A fitted router at work: the Transformer and its meta-controller. No Pyro, no prior.

    `policy` decides HARD routes; `summary` is what a run said of itself, where it came from one;
    `frozen` are the units whose route is static, None: every unit chooses.
    """

    def __init__(self, config: ModelConfig, policy: Policy | None = None):
        super().__init__()
        self.config = config
        self.network = RoutedTransformer(config)
        self.controller = MetaController(
            config.d_model,
            config.num_layers,
            len(config.experts),
            config.controller_hidden,
            config.concentration_floor,
            config.num_units,
        )
        self.policy: Policy = policy or Argmax()
        self.summary: dict[str, Any] | None = None
        self.frozen: Frozen | None = None

    def freeze(self, tokens: Tensor | TokenSource, **settings: Any) -> Freezing:
        """Make static what hardly moves, and free what it kept: see `freezing.freeze_model`.

        `frozen = None` takes it back; `save_pretrained` keeps it.
        """
        return freeze_model(self, tokens, **settings)

    def new_cache(self, batch: int, capacity: int) -> RoutedCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens.

        Under `frozen`, without the keys that nobody reads.
        """
        return self.network.new_cache(batch, capacity, short_by_layer(self, self.frozen))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json, the weights, the policy and a card; `from_pretrained` reads them.

        The settings of training, its corpus and its optimiser are a run's: copy the run folder to
        keep them, or to evaluate and report.

        Raises:
            ValueError: the policy is not registered.
        """
        save_model(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder_or_name: Path | str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "RoutedLanguageModel":
        """A fitted model, in evaluation mode on the CPU, with its policy, evidence and risk.

        Args:
            folder_or_name: of `save_pretrained`, or a run folder of `fit`, which asks nobody; or
                OWNER/REPOSITORY, which is kept in the hub's cache.
            revision: branch, tag or commit of a repository.
            local_files_only: of a repository: take what the cache has and ask nobody.

        Raises:
            ValueError: there is no such folder or repository, or a file is missing or damaged.
        """
        model: RoutedLanguageModel = load_model(
            folder_of(folder_or_name, revision, local_files_only), cls
        )
        return model

    def show_last(self, see: Callable[[Tensor], object]) -> RemovableHandle:
        """Show `see` what the head reads, [B, T, D], in every pass until the handle is removed."""
        return self.network.norm.register_forward_hook(
            lambda module, inputs, output: (see(output), None)[1]
        )

    @classmethod
    def from_config(cls, config: Config) -> "RoutedLanguageModel":
        """An untrained model."""
        return cls(config.model)

    @property
    def counted_experts(self) -> list[Expert]:
        """The experts of a layer as the cost models count them."""
        return build_experts(self.config)

    def forward(
        self,
        tokens: Tensor,
        mode: RoutingMode | str = RoutingMode.HARD,
        force: Force | None = None,
        cache: RoutedCache | None = None,
        last_only: bool = False,
        lengths: Tensor | None = None,
    ) -> RoutingOutput:
        """Logits and, for every layer, the posterior and the route that was executed.

        Args:
            tokens: int64 [B, T]; padding too must be ids.
            mode: SAMPLE, MEAN or HARD.
            force: send tokens where it says instead: an expert's name, choices [L, B, T, R] or
                weights [L, B, T, R, E]; without the dimension R for all units.
            cache: what came before; the tokens are added to it.
            last_only: logits of each row's last real token alone.
            lengths: [B] real tokens of each row; what comes out for the rest, right padding, means
                nothing. Default all.
        """
        chosen = choose("mode", mode, RoutingMode)
        forced = (
            None
            if force is None
            else forced_route(
                force, self.config.experts, self.config.num_layers, self.config.num_units
            )
        )
        watched = isinstance(self.policy, Guard) and chosen is RoutingMode.HARD
        concentrations, routes = [], []

        frozen = self.frozen
        fast = chosen is RoutingMode.HARD and forced is None and not watched and frozen is None

        def route(layer: int, hidden: Tensor) -> Tensor | int:
            if fast and (found := fused.chosen(self.controller, layer, hidden, self.policy)):
                concentrations.append(found[0])
                routes.append(found[1])
                return found[1]
            q = posterior(self.controller, frozen, layer, hidden, self.network.num_experts)
            alarm = self._alarm(layer, hidden, cache, lengths) if watched else None
            executed = (
                execute(q, chosen, self.policy, alarm) if forced is None else forced(layer, hidden)
            )
            if frozen is not None and isinstance(executed, Tensor) and forced is None:
                executed = frozen.fix(layer, executed)
            concentrations.append(q.concentration)
            routes.append(as_units(executed, q.concentration))
            return executed

        logits = self.network(tokens, route, cache, last_only, lengths)
        return RoutingOutput(logits, torch.stack(concentrations), torch.stack(routes))

    def _alarm(
        self, layer: int, hidden: Tensor, cache: RoutedCache | None, lengths: Tensor | None
    ) -> Tensor | None:
        """Which tokens [B, T] a guard is alarmed by.

        Its memory of the texts is kept beside the cache.
        """
        real = None if lengths is None else real_tokens(lengths, hidden.shape[1])
        past: Any = None if cache is None else cache.beside.get(layer)
        if cache is not None and past is None and cache[layer].longest > 0:
            past = UNKNOWN  # these texts began under another policy
        alarm, state = guarded(self.policy, self.controller.evidence, layer, hidden, past, real)
        if cache is not None and state is not None:
            cache.keep(layer, state)
        return alarm
