"""A fitted patch and a text: the budget, quality or guard that is set on it, what is kept of it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayes_router.checks import choose, not_negative, require, whole
from bayes_router.data.fingerprint import require_unseen
from bayes_router.data.stream import TokenStream, stream_of
from bayes_router.data.tokens import Batch
from bayes_router.integrations.huggingface.language import RoutedLanguage, Unforced
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


class Promising(RoutedLanguage):
    """A patched language model whose policy is set by what it spends or loses on a text.

    It also keeps the evidence and the risk of one.
    """

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
            The executed cost on that text, within 0.005 of the budget, or within `tolerance` in
            such a jump.

        Raises:
            ValueError: no text, or a budget that no price realises: out of range, or in a jump; the
                message names what is within reach.
        """
        self.require_patched()
        by_bytes = choose("by", by, CostBy) is CostBy.BYTES
        self.require_steps(by)
        source = self._source(texts, tokenizer)
        context = _window(source, context, limit)
        not_negative("tolerance", tolerance)
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

    def require_steps(self, by: str) -> None:
        """ValueError where a budget is over bytes of decoding, and the model never decodes."""
        ok = self.causal or CostBy(by) is CostBy.FLOPS
        require(ok, "by", "flops, for a model whose tokens see both sides: it has no steps", by)

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
        context = _window(stream, context, tokens, "tokens")
        whole("batch_size", batch_size)
        batches = stream.windows(context, batch_size, max(tokens, context), spread=True)
        return fit_evidence(self, batches, self.prior.totals.flatten(1).mean(1))

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
        context = _window(stream, context, tokens, "tokens")
        whole("batch_size", batch_size)
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
        context = _window(source, context, limit)
        windows = list(source.windows(context, 1, max(limit, context), spread=True))
        if self.fitted is not None:
            tokens = torch.cat([batch.tokens.flatten() for batch in windows])
            require_unseen(tokens, self.fitted.text, fix)
        return windows


def _window(source: TokenStream, context: int, limit: int, name: str = "limit") -> int:
    """Tokens of a window: as asked, or all there are.

    Raises:
        ValueError: what is asked is no whole number above 0.
    """
    whole(name, limit)
    return min(whole("context", context), len(source) - 1)
