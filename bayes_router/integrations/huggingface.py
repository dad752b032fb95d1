"""Patch a Hugging Face model: by the attention interface of transformers 5, so that every architecture it serves is served.

The interface hands over queries, keys and values after projection, rotary positions and the KV cache; a forward pre-hook
hands over the hidden state that the controller reads. With every token on `full` the model's own kernel is called with its
own arguments, so outputs are bit for bit the original's.
"""

from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bayes_router.checks import choose, require
from bayes_router.config import ScheduleConfig
from bayes_router.data.stream import stream_of
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.integrations import falcon
from bayes_router.integrations.binding import BINDING, Binding
from bayes_router.integrations.discovery import check_model, find_layers, probe
from bayes_router.integrations.interface import install, keep_hidden
from bayes_router.integrations.routed import RoutedModel
from bayes_router.integrations.settings import PatchSettings, model_config
from bayes_router.transformer.model import Force, forced_route
from bayes_router.types import Route, RoutingMode, RoutingOutput


class RoutedPretrained(RoutedModel):
    """A patched Hugging Face model; see `RoutedModel`. It answers the calls of `RoutedLanguageModel` that evaluation makes."""

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
        answer = None if forced is None else forced_route(forced, self.experts, len(self.layers))
        concentrations, routes = [], []

        def route(layer: int, hidden: Tensor) -> Tensor | int:
            q = self.controller.posterior(layer, hidden)
            executed = self.decide(layer, q, chosen) if answer is None else answer(layer, hidden)
            concentrations.append(q.concentration)
            routes.append(executed if isinstance(executed, Tensor) else torch.full_like(tokens, executed))
            self._concentration[layer], self._executed[layer] = concentrations[-1], routes[-1]
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

    def fit(
        self,
        texts: Any,
        *,
        tokenizer: Any = None,
        schedule: ScheduleConfig | None = None,
        valid_fraction: float = 0.1,
        progress: bool = False,
        **settings: Any,
    ) -> pd.DataFrame:
        """Distil the linear experts from the layers' own attention, then fit controllers and experts by SVI on the ELBO.

        Args:
            texts: a text, several, or token ids int64 [N].
            tokenizer: the model's, where texts are text.
            schedule: of KL weight, prior and concentration; starts on full attention by default.
            valid_fraction: the end of the text, held out for `set_budget`.
            progress: show bars.
            settings: of `FitSettings`: steps, distil_steps, context, batch_size, lr, controller_lr, weights_lr, likelihood,
                budget, seconds, seed, ... With weights_lr above 0 the model moves: save it beside the patch.

        Returns:
            One row a step: nll, kl, elbo in nats per token, the executed cost and the price; with the unpatched model as
            likelihood also the divergence from it. `attrs["distillation"]` has the errors of the first phase.
        """
        from bayes_router.integrations import tuning

        self.require_patched()
        chosen = tuning.FitSettings(**settings)
        stream = stream_of(texts, tokenizer, self.config.vocab_size, self.causal)
        source, self.held_out = stream.split(valid_fraction)
        devices = [p.device for p in self.model.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices), tuning.fitting(self, chosen.weights_lr > 0):
            torch.manual_seed(chosen.seed)
            errors = tuning.distil(self, source, chosen, progress)
            steps = schedule or tuning.default_schedule(len(self.layers))
            frame = tuning.fit_routes(self, source, chosen, steps, progress)
            self.made_for = "" if chosen.weights_lr > 0 else self.made_for
            self.fitted = tuning.record(self, chosen, steps, frame, len(source), getattr(tokenizer, "name_or_path", None))
        frame.attrs["distillation"] = errors
        return frame

    def program(self, schedule: ScheduleConfig | None = None) -> tuple[RoutingModel, RoutingGuide]:
        """The Pyro model and guide of this patch under the objective at the end of a fit: for SVI of one's own, `Predictive`.

        Their arguments are (tokens int64 [B, T], targets or None).
        """
        from bayes_router.integrations import tuning

        if schedule is None and self.fitted is not None:
            return tuning.program(self, tuning.recorded_state(self, self.fitted))
        return tuning.program(self, tuning.final_state(self, schedule))

    def set_budget(
        self,
        budget: float,
        texts: Any = None,
        *,
        tokenizer: Any = None,
        context: int = 512,
        limit: int = 8192,
        tolerance: float = 0.005,
    ) -> float:
        """Let executed attention cost `budget` of attention over all keys, on text held out by `fit` or on `texts`.

        Costs are those of the prior's cost model. Afterwards `policy` is a `Budget` at the price that was found.

        Args:
            budget: full attention = 1.
            texts: text, texts or tokens; default what `fit` held out.
            tokenizer: of texts.
            context: tokens of a window.
            limit: tokens that are read.
            tolerance: how far from the budget a cost may be where many tokens have one posterior, so that no price comes within
                0.005 (small models of bytes).

        Returns:
            The realised cost on that text, within 0.005 of the budget, or within `tolerance` in such a jump.

        Raises:
            ValueError: no text, or a budget that no price realises: out of range, or in a jump; the message names what is
                within reach.
        """
        self.require_patched()
        from bayes_router.integrations.budget import solve

        source = self.held_out if texts is None else stream_of(texts, tokenizer, self.config.vocab_size, self.causal)
        if source is None:
            raise ValueError("texts: expected held-out text, from fit() or given here; got None; pass texts=")
        context = min(context, len(source) - 1)
        return solve(self, source, budget, context, max(limit, context), tolerance)


class Network:
    """(tokens [B, T], route) -> logits [B, T, V] of a patched model, every layer's route answered by `route(layer, hidden)`."""

    def __init__(self, router: RoutedPretrained):
        self.router = router

    def __call__(self, tokens: Tensor, route: Route) -> Tensor:
        """See the class."""
        with self.router.routed_by(route):
            return self.router.logits(tokens, **({"use_cache": False} if self.router.causal else {}))

    @property
    def embed(self) -> torch.nn.Module:
        """Token ids to vectors."""
        model = self.router.model
        assert isinstance(model, PreTrainedModel)
        embedding: torch.nn.Module = model.get_input_embeddings()
        return embedding


def patch_pretrained(model: PreTrainedModel, settings: PatchSettings) -> RoutedPretrained:
    """Route the attention layers of `model`; see `bayes_router.patch`."""
    base = check_model(model)
    restore = falcon.install(model) if base == falcon.OWN else install(model, base)
    router = None
    try:
        found = find_layers(model, settings)
        router = RoutedPretrained(model, found, settings)
        router.config = model_config(found[0], settings, len(found), model.config.get_text_config().vocab_size)
        router._restore += restore
        router._bind()
        for one in found:
            binding: Binding = getattr(one.module, BINDING)
            handle = one.module.register_forward_pre_hook(partial(keep_hidden, binding), with_kwargs=True)
            router._restore.append(handle.remove)
        verify(router)
    except BaseException:
        for undo in restore if router is None else [router.unpatch]:
            undo()
        raise
    return router


def verify(router: RoutedPretrained) -> None:
    """Compare the patched model, every token on full attention, with the original on a few tokens; try a mixed route too.

    Raises:
        ValueError: they differ, a layer was not routed, or the mixed route cannot be executed.
    """
    model = router.model
    assert isinstance(model, PreTrainedModel)
    seen: set[int] = set()

    def full(layer: int, hidden: Tensor) -> int:
        seen.add(layer)
        return router.experts.index("full")

    def mixed(layer: int, hidden: Tensor) -> Tensor:
        return (torch.arange(hidden.shape[1], device=hidden.device) % len(router.experts)).expand(hidden.shape[:2])

    try:
        with router.routed_by(mixed):
            probe(model)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"model: expected attention that can be cut by query and key; {type(model).__name__} fails when its tokens are "
            f"routed differently: {error}; this architecture is not served"
        ) from error
    with router.routed_by(full):
        routed = probe(model)
    bindings = [(one.module, one.module.__dict__.pop(BINDING)) for one in router.found]
    original = probe(model)
    for module, binding in bindings:
        setattr(module, BINDING, binding)
    if len(seen) != len(router.found) or not torch.equal(routed, original):
        raise ValueError(
            f"model: expected outputs of {type(model).__name__} unchanged by a patch with every token on full attention; "
            f"they differ, or a layer was not reached ({len(seen)} of {len(router.found)}); this architecture is not served"
        )
