"""What `patch` returns for a Hugging Face model.

The routed language model, its fit and its budget.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayes_router.checks import choose, require
from bayes_router.config import ScheduleConfig
from bayes_router.data.fingerprint import fingerprint, require_unseen
from bayes_router.data.mixture import source_of
from bayes_router.data.stream import TokenStream, stream_of
from bayes_router.data.tokens import Batch
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.huggingface import fit_settings, fitting, freezing
from bayes_router.integrations.huggingface.freed_cache import attend_freed, free, freed
from bayes_router.integrations.huggingface.language import RoutedLanguage, Unforced
from bayes_router.integrations.huggingface.replay import Replay
from bayes_router.integrations.huggingface.svi_step import program
from bayes_router.routing.cost import CostBy, counted
from bayes_router.routing.evidence import Evidence
from bayes_router.routing.policy import at_price
from bayes_router.routing.risk import Risk
from bayes_router.training.dial import TOLERANCE, Dial
from bayes_router.training.evidence import FIT_TOKENS, fit_evidence
from bayes_router.training.guarantee import Guarantee, promise
from bayes_router.training.guarding import Guarded, set_guard
from bayes_router.training.risk import FIT_TOKENS as RISK_TOKENS
from bayes_router.training.risk import fit_risk, read_risk

if TYPE_CHECKING:
    import pandas as pd


class RoutedPretrained(RoutedLanguage):
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
            One row a step: nll, kl, elbo in nats per token, the executed cost and the price; with
            the unpatched model as likelihood also the divergence from it. `attrs["distillation"]`
            has the errors of the first phase.
        """
        self.require_patched()
        self.require_thawed("fit")
        chosen = fit_settings.FitSettings(**settings)
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
        share: float = 0.01,
        tokenizer: Any = None,
        context: int = 512,
        limit: int = 32_768,
    ) -> freezing.Freezing:
        """Make static what hardly moves.

        Units that the policy of now sends to one expert, but for `share` of the tokens.

        Their controllers are not run any more, and no guard moves them. A key head all of whose
        query heads are frozen on `local` keeps sinks and window alone in a cache of transformers
        that grows (`DynamicCache`), from the first pass over a text longer than these: its other
        keys and values are dropped, not hidden. That asks for patches of `full` and `local` alone,
        sdpa, layers that do not slide, no padding and no autograd; elsewhere the cache stays whole.
        Such a cache cannot be cropped, and no route can be forced behind it.

        Args:
            texts: text, texts or token ids int64 [N] that `fit` did not read; default what it held
                out.
            share: of the tokens, below a half.
            tokenizer: of texts.
            context: tokens of a window.
            limit: tokens that are read, half of them to choose the units.

        Returns:
            What was frozen and what it costs, in loss and keys. `thaw()` takes it back; `save`
            keeps it.

        Raises:
            ValueError: no text, or less than two windows of it.
        """
        self.require_patched()
        source = self._source(texts, tokenizer)
        return freezing.freeze(
            self, list(source.windows(context, 1, max(limit, 2 * context))), share
        )

    replay: Replay | None = None
    """What is captured of the model while `graphs` is on."""

    @property
    def graphs(self) -> bool:
        """Whether the model's own calls are replayed from CUDA graphs where they can be.

        Prompts, and steps behind a static cache (`cache_implementation="static"`), of a patch of
        `full` and `local` on a GPU; `last.replayed` and `last.as_called` say what was. Set to True
        again it forgets what was captured.

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

    def set_quality(
        self,
        lost: float,
        texts: Any = None,
        *,
        confidence: float = 0.95,
        tokenizer: Any = None,
        context: int = 512,
        limit: int = 65_536,
    ) -> Guarantee:
        """Take the cheapest policy whose expected loss is at most `lost`, with that confidence.

        The loss is over the unpatched model.

        It holds for windows exchangeable with those of the text: of its kind, and `context` tokens
        long.

        Args:
            lost: share of perplexity.
            texts: text, texts or tokens that `fit` did not read; default what it held out.
            confidence: between 0 and 1.
            tokenizer: of texts.
            context: tokens of a window.
            limit: tokens that are read, evenly spread, once for each policy tried.

        Returns:
            The policy's price, cost and bound; `policy` is set to it.

        Raises:
            ValueError: no text, or too little to promise anything by (with how many windows it
                would take).
        """
        self.require_patched()
        windows = self._calibration(texts, tokenizer, context, limit)
        family, full = at_price("argmax", self.cost_ratio.tolist()), self.experts.index("full")
        found = promise(Unforced(self), windows, self.layer_cost, family, full, lost, confidence)
        self.policy = family(found.kept.price)
        return found

    def set_guard(
        self,
        texts: Any = None,
        *,
        spend: float = 0.01,
        confidence: float = 0.95,
        tokenizer: Any = None,
        context: int = 512,
        limit: int = 65_536,
    ) -> Guarded:
        """Put a guard before the policy.

        Text unlike the fit's takes full attention, see `routing.guard`.

        Args:
            texts: text, texts or tokens like the fit's that `fit` did not read; default what it
                held out.
            spend: share by which such text may cost more for it.
            confidence: of that, between 0 and 1.
            tokenizer: of texts.
            context: tokens of a window.
            limit: tokens that are read, evenly spread, twice.

        Returns:
            The guard and what it costs; `policy` is set to it, at the price that the policy had.

        Raises:
            ValueError: a fit without evidence, no text or too little, or a policy without a price.
        """
        self.require_patched()
        windows = self._calibration(texts, tokenizer, context, limit)
        full = self.experts.index("full")
        found = set_guard(
            Unforced(self), self.controller, windows, self.layer_cost, full, spend, confidence
        )
        self.policy = replace(found.policy, cost_ratio=tuple(self.cost_ratio.tolist()))
        return found

    def _source(self, texts: Any, tokenizer: Any) -> TokenStream:
        """Some text, or what `fit` held out."""
        if texts is not None:
            return stream_of(texts, tokenizer, self.config.vocab_size, self.causal)
        source = self.held_out
        if source is None:
            raise ValueError(
                "texts: expected held-out text, from fit() or given here; got None; pass texts="
            )
        return source

    def _calibration(self, texts: Any, tokenizer: Any, context: int, limit: int) -> list[Batch]:
        """Windows of some text, or of what `fit` held out."""
        source = self._source(texts, tokenizer)
        fix = "give text that it has not seen, or leave texts out to take what fit held out"
        context = min(context, len(source) - 1)
        windows = list(source.windows(context, 1, max(limit, context), spread=True))
        if self.fitted is not None:
            tokens = torch.cat([batch.tokens.flatten() for batch in windows])
            require_unseen(tokens, self.fitted.text, fix)
        return windows

    def fit_evidence(
        self,
        texts: Any,
        *,
        tokenizer: Any = None,
        context: int = 512,
        batch_size: int = 1,
        tokens: int = FIT_TOKENS,
    ) -> Evidence:
        """Keep the density of what the controllers read in `texts`, text like the fit's.

        `routing.evidence` has the formula.

        Routes, budgets and losses stay. `save` keeps it; `watching(router.controller)` reads it.

        Args:
            texts: a text, several, or token ids int64 [N].
            tokenizer: the model's, where texts are text.
            context: tokens of a window, as the text will be read.
            batch_size: windows at a time.
            tokens: read at most, evenly spread over the texts.

        Raises:
            ValueError: hardly any text.
        """
        self.require_patched()
        stream = stream_of(texts, tokenizer, self.config.vocab_size, self.causal)
        context = min(context, len(stream) - 1)
        batches = stream.windows(context, batch_size, max(tokens, context), spread=True)
        return fit_evidence(self, batches, torch.tensor(self.prior.total_concentration))

    def fit_risk(
        self,
        texts: Any,
        *,
        tokenizer: Any = None,
        context: int = 512,
        batch_size: int = 1,
        tokens: int = RISK_TOKENS,
    ) -> Risk:
        """Keep an estimate of what routing loses under the policy of now.

        It is learned from routed and unrouted passes over `texts`.

        Args:
            texts: a text, several, or token ids int64 [N].
            tokenizer: the model's, where texts are text.
            context: tokens of a window, as the text will be read.
            batch_size: windows at a time.
            tokens: read at most, twice, evenly spread over the texts.

        Raises:
            ValueError: hardly any text, or every token is on full attention.
        """
        self.require_patched()
        stream = stream_of(texts, tokenizer, self.config.vocab_size, self.causal)
        context = min(context, len(stream) - 1)
        return fit_risk(
            self,
            stream.windows(context, batch_size, max(tokens, context), spread=True),
            self.unrouted,
            tokens=tokens,
        )

    def risk(self, tokens: Tensor) -> Tensor:
        """Estimated KL(unrouted || routed) of each token, nats [B, T], from one routed pass.

        The tokens are int64 [B, T].

        Raises:
            ValueError: no estimate was fitted: `fit_risk`.
        """
        self.require_patched()
        return read_risk(self, tokens)

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

    def set_budget(
        self,
        budget: float,
        texts: Any = None,
        *,
        tokenizer: Any = None,
        context: int = 512,
        limit: int = 8192,
        tolerance: float = TOLERANCE,
        by: str = "flops",
    ) -> float:
        """Let executed attention cost `budget` of attention over all keys.

        On text held out by `fit`, or on `texts`.

        Afterwards `policy` is a `Budget` at the price that was found.

        Args:
            budget: full attention = 1.
            texts: text, texts or tokens; default what `fit` held out.
            tokenizer: of texts.
            context: tokens of a window.
            limit: tokens that are read.
            tolerance: how far from the budget a cost may be where many tokens have one posterior,
                so that no price comes within 0.005 (small models of bytes).
            by: `flops`, the costs of the prior's cost model, which every query head pays for its
                own expert; or `bytes`, the keys and values that a decoding step at
                `settings.context` tokens reads, which a key head pays for the most that one of its
                query heads reads.

        Returns:
            The realised cost on that text, within 0.005 of the budget, or within `tolerance` in
            such a jump.

        Raises:
            ValueError: no text, or a budget that no price realises: out of range, or in a jump; the
                message names what is within reach.
        """
        self.require_patched()
        source = self._source(texts, tokenizer)
        context = min(context, len(source) - 1)
        by_bytes = choose("by", by, CostBy) is CostBy.BYTES
        sharing = max(self.config.num_units // self.config.kv_heads, 1)
        dial = Dial(
            Unforced(self),
            source,
            counted(self.layer_reads, sharing) if by_bytes else self.layer_cost,
            context=context,
            batch_size=1,
            limit=max(limit, context),
            policy=at_price("argmax", self.cost_ratio.tolist()),
            experts=self.experts,
        )
        found = dial.solve(budget, jump=max(tolerance, TOLERANCE))
        self.policy = dial.policy(found.price)
        return found.cost
