"""What `patch` returns for a Hugging Face model.

The routed language model, its fit, its program.
"""

from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayes_router.checks import nearest, require, whole
from bayes_router.config import ScheduleConfig
from bayes_router.data.fingerprint import fingerprint
from bayes_router.data.mixture import source_of
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.huggingface import fit_settings, fitting, freezing
from bayes_router.integrations.huggingface.freed_cache import attend_freed, free, freed
from bayes_router.integrations.huggingface.holding import Holding, holding
from bayes_router.integrations.huggingface.promising import Promising
from bayes_router.integrations.huggingface.replay import Replay
from bayes_router.integrations.huggingface.svi_step import program

if TYPE_CHECKING:
    import pandas as pd


class RoutedPretrained(Promising):
    """A patched Hugging Face model: see `RoutedModel` for how it routes; it is fitted here."""

    def fit(
        self,
        texts: Any,
        *,
        tokenizer: Any = None,
        schedule: ScheduleConfig | None = None,
        valid_fraction: float = 0.1,
        progress: bool = True,
        **settings: Any,
    ) -> "pd.DataFrame":
        """Distil the linear experts, then fit controllers and experts by SVI on the ELBO.

        The linear experts learn from the layers' own attention.

        Args:
            texts: a text, several, or token ids int64 [N]; or these by name, kinds of text that are
                drawn alike (`Mixture` where some are drawn more often).
            tokenizer: the model's, where texts are text.
            schedule: of KL weight, prior and concentration; by default it starts on full attention,
                and for a range of budgets executes draws from the first step.
            valid_fraction: the end of the text, held out for `set_budget`.
            progress: show bars, or without a terminal a line every few seconds.
            settings: of `FitSettings`: steps, distil_steps, context, batch_size, lr, controller_lr,
                weights_lr, likelihood, budget, seconds, seed, ... With weights_lr above 0 the model
                moves: save it beside the patch.

        Returns:
            One row a step: nll, kl, elbo in nats per token, the executed cost and the price; where
            the unpatched model is observed, wholly or in part, also the divergence from it.
            `attrs["distillation"]` has the errors of the first phase.
        """
        self.require_patched()
        self.require_thawed("fit")
        known = [field.name for field in fields(fit_settings.FitSettings)]
        for given in settings.keys() - set(known):
            raise TypeError(f"fit() got an unexpected argument {given!r}{nearest(given, known)}")
        chosen = fit_settings.FitSettings(**settings)
        self.require_steps(chosen.by)
        if schedule is not None:
            schedule.check_experts(self.experts, self.config.num_units)
        source, self.held_out = source_of(
            texts, tokenizer, self.config.vocab_size, self.causal
        ).split(valid_fraction)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), fitting.fitting(self, chosen.weights_lr > 0):
            torch.manual_seed(chosen.seed)
            errors = fitting.distil(self, source, chosen, progress)
            steps = schedule or fit_settings.default_schedule(
                len(self.layers) * self.config.num_units, isinstance(chosen.budget, tuple)
            )
            frame = fitting.fit_routes(self, source, chosen, steps, progress)
            self.made_for = None if chosen.weights_lr > 0 else self.made_for
            name, read = getattr(tokenizer, "name_or_path", None), fingerprint(source.tokens)
            self.fitted = replace(
                fit_settings.record(self, chosen, steps, frame, len(source), name), text=read
            )
        frame.attrs["distillation"] = errors
        return frame

    def freeze(
        self,
        texts: Any = None,
        *,
        share: float | None = None,
        free: float | None = None,
        tokenizer: Any = None,
        context: int = 512,
        limit: int = 32_768,
    ) -> freezing.Freezing:
        """Make static what hardly moves.

        Units that the policy of now sends to one expert, but for `share` of the tokens. Or, with
        `free`, the key heads that look far least, as many as free that share of the cache: all
        their query heads stand on `local`, no other unit is touched, and under a budget the price
        is set anew, so that what they no longer spend is spent where others look far, and the
        executed cost stays. That loses less for the same memory.

        Their controllers are not run any more, and no guard moves them. A key head all of whose
        query heads are frozen on `local` keeps sinks and window alone in a cache of transformers
        that grows (`DynamicCache`), from the first pass over a text longer than these: its other
        keys and values are dropped, not hidden. That asks for patches of `full` and `local` alone,
        sdpa, layers that do not slide, no padding and no autograd; elsewhere the cache stays whole.
        Such a cache cannot be cropped, and no route can be forced behind it.

        Args:
            texts: text, texts or token ids int64 [N] that `fit` did not read; default what it held
                out.
            share: of the tokens, below a half; default 0.01.
            free: in place of it, the share of a cache's keys and values behind `context` tokens.
            tokenizer: of texts.
            context: tokens of a window.
            limit: tokens that are read, half of them to choose the units.

        Returns:
            What was frozen and what it costs, in loss and keys. `thaw()` takes the units back (not
            the price: call `set_budget` again); `save` keeps them.

        Raises:
            ValueError: no text, less than two windows of it, `share` beside `free`, or more to free
                than there is.
        """
        self.require_patched()
        whole("limit", limit), whole("context", context)
        source = self._source(texts, tokenizer)
        return freezing.freeze(self, source, context, limit, share, free)

    def holding(self, budget: float) -> AbstractContextManager[Holding]:
        """Hold a budget as text goes by, whatever its kind: `with router.holding(0.3) as held:`.

        `set_budget` sets a price once, on one text, and another kind of text costs more or less
        under it. Here the price moves after every pass of the block (a document, a part of a
        prompt, a step of decoding), so that all of them together cost the budget; `held.cost` says
        what they did. See `Holding`.

        Args:
            budget: full attention = 1, by the costs of `set_budget`.

        Raises:
            ValueError: a budget that is not between the cheapest expert's cost and 1, another
                policy than argmax or one at a price, frozen units,
                or `graphs`, whose passes are replayed under the policy that they were captured by.
        """
        self.require_patched()
        self.require_thawed("holding")
        require(not self.graphs, "graphs", "False while a budget is held", True)
        return holding(self, budget)

    replay: Replay | None = None
    """What is captured of the model while `graphs` is on."""

    @property
    def graphs(self) -> bool:
        """Whether the model's own calls are replayed from CUDA graphs where they can be.

        Prompts, and steps behind a static cache (`cache_implementation="static"`), of a patch of
        `full` and `local` on a GPU; `last.replayed` and `last.as_called` say what was. As called,
        and so said there, run passes under frozen units, whose caches drop keys, and under
        `watching`. Set to True again it forgets what was captured.

        Raises:
            ValueError: set where there is none to replay, named, with the reason.
        """
        return self.replay is not None

    @graphs.setter
    def graphs(self, on: bool) -> None:
        self.require_patched()
        if self.replay is not None:
            for undo in self.replay.undo:
                self.undo.remove(undo)
                undo()
            self.replay = None
        if on:
            self.replay = Replay(self)
            self.undo += self.replay.undo

    def attend(self, index: int, hidden: Tensor, call: AttentionCall, cache: Any = None) -> Tensor:
        """See `RoutedModel.attend`.

        Key heads that are frozen on `local` keep what they read in `cache`.
        """
        place = getattr(self.found[index].module, "layer_idx", None)
        kept = None if self.frozen is None else freezing.short_heads(self, self.frozen, index)
        short = freed(cache, place)
        if short is None:
            out = super().attend(index, hidden, call)
            if kept is not None and kept.short and cache is not None:
                free(cache, place, kept, call)
            return out
        require(
            kept == short.heads and self._force is None and self.here.route is None,
            "past_key_values",
            "a cache whose keys were dropped to be read under the routes that it was written under",
            "other frozen units, or a forced route",
            "read the text anew",
        )
        R, H = self.config.num_units, call.q.shape[1]
        group = H // self.config.kv_heads
        units = sorted(
            {(head * group + i) * R // H for head in short.heads.whole for i in range(group)}
        )
        route = self.route_call(index, hidden, call)
        assert isinstance(route, Tensor)

        def live(part: AttentionCall) -> Tensor:
            return self.execute(index, route[:, :, units], part, hidden)

        return attend_freed(short, call, live)

    def program(self, schedule: ScheduleConfig | None = None) -> tuple[RoutingModel, RoutingGuide]:
        """The Pyro model and guide of this patch under the prior at the end of a fit.

        For SVI of one's own, `Predictive`.

        Their arguments are (tokens int64 [B, T], targets or None).
        """
        return program(self, fit_settings.objective_at_end(self, schedule))

    @property
    def kl_weight(self) -> float:
        """Weight of the KL at the end of the fit, or where there was none by default."""
        return fit_settings.objective_at_end(self).kl_weight
