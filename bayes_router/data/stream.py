"""Text for a patched language model.

Ids in one stream, with the targets that its kind of model is scored on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_router.checks import not_negative, require
from bayes_router.data.tokens import Batch, TokenDataset, step_rng
from bayes_router.types import IGNORED

MASKED_SHARE = 0.15
LEAST_TOKENS = 4


class TokenStream(TokenDataset):
    """Token ids [N] as one stream, made by any tokeniser."""

    def __init__(self, tokens: Tensor, vocab_size: int, name: str = "text"):
        """Take `tokens` int64 [N] as they are."""
        require(
            tokens.dim() == 1 and tokens.numel() >= LEAST_TOKENS,
            "texts",
            f"{LEAST_TOKENS} tokens or more",
            tuple(tokens.shape),
        )
        low, high = int(tokens.min()), int(tokens.max())
        require(
            low >= 0 and high < vocab_size,
            "texts",
            f"ids from 0 to {vocab_size - 1}",
            (low, high),
            "check the tokeniser",
        )
        self.name, self.vocab_size, self.tokens = name, vocab_size, tokens.to("cpu", torch.int32)

    def split(self, valid_fraction: float) -> "tuple[TokenStream, TokenStream]":
        """The beginning and the last `valid_fraction` of the stream."""
        expected = "a share of the text, 0 or more and less than 1"
        fraction = not_negative("valid_fraction", valid_fraction, expected)
        require(fraction < 1, "valid_fraction", expected, valid_fraction)
        held_out = max(int(len(self) * valid_fraction), LEAST_TOKENS)
        require(
            len(self) >= 2 * held_out,
            "texts",
            f"at least {2 * LEAST_TOKENS} tokens",
            len(self),
            "give more text",
        )
        parts = self.tokens[:-held_out], self.tokens[-held_out:]
        first, last = self.like(parts[0], "fit"), self.like(parts[1])
        return first, last

    def like(self, tokens: Tensor, name: str = "held out") -> "TokenStream":
        """Other tokens, read in the same way."""
        other = copy(self)
        other.tokens, other.name = tokens, name
        return other


class MaskedStream(TokenStream):
    """For an encoder with a masked-language-modelling head.

    15% of the tokens hidden, and they alone are scored.

    A target is the hidden token itself, at its own place.
    """

    def __init__(self, tokens: Tensor, vocab_size: int, mask_token: int, name: str = "text"):
        """Take `tokens` int64 [N] as they are; a hidden one is read as `mask_token`."""
        super().__init__(tokens, vocab_size, name)
        self.mask_token = mask_token

    def batch(
        self,
        step: int,
        batch_size: int,
        context: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """See `TokenSource.batch`."""
        tokens = super().batch(step, batch_size, context, seed, rank, world_size).tokens
        hidden = torch.from_numpy(step_rng(seed + 1, step).random(tokens.shape)) < MASKED_SHARE
        return self._hide(tokens, hidden)

    def windows(
        self, context: int, batch_size: int, limit: int | None = None, spread: bool = False
    ) -> Iterator[Batch]:
        """See `TokenDataset.windows`; every seventh token hidden."""
        for batch in super().windows(context, batch_size, limit, spread):
            yield self._hide(
                batch.tokens, (torch.arange(context) % 7 == 3).expand(batch.tokens.shape)
            )

    def _hide(self, tokens: Tensor, hidden: Tensor) -> Batch:
        return Batch(
            tokens.masked_fill(hidden, self.mask_token), tokens.masked_fill(~hidden, IGNORED)
        )


def stream_of(
    texts: Any, tokenizer: Callable[..., Any] | None, vocab_size: int, causal: bool
) -> TokenStream:
    """One stream from a text, several, or ids int64 [N].

    Raises:
        ValueError: text without a tokenizer, no text, ids out of the vocabulary, or an encoder
            without a mask token.
    """
    if isinstance(texts, TokenStream):
        return texts
    if isinstance(texts, np.ndarray):
        texts = torch.from_numpy(texts)
    if not isinstance(texts, Tensor):
        of_text = isinstance(texts, str) or (
            isinstance(texts, Iterable) and all(isinstance(one, str) for one in texts)
        )
        require(of_text, "texts", "text, texts or ids as a tensor [N]", type(texts).__name__)
        require(
            tokenizer is not None,
            "tokenizer",
            "the model's tokenizer, to read text",
            None,
            "or give ids as a tensor [N]",
        )
        assert tokenizer is not None
        documents: Sequence[str] = [texts] if isinstance(texts, str) else list(texts)
        require(
            len(documents) > 0 and all(isinstance(d, str) for d in documents),
            "texts",
            "one text or more",
            documents,
        )
        end = getattr(tokenizer, "eos_token_id", None)
        ids: list[int] = []
        for document in documents:
            ids += tokenizer(document, add_special_tokens=False)["input_ids"] + (
                [] if end is None else [end]
            )
        texts = torch.tensor(ids)
    whole = not (texts.is_floating_point() or texts.is_complex() or texts.dtype == torch.bool)
    require(whole, "texts", "token ids, whole numbers", texts.dtype)
    flat = texts.flatten().long()
    if causal:
        return TokenStream(flat, vocab_size)
    mask_token = getattr(tokenizer, "mask_token_id", None)
    require(
        mask_token is not None, "tokenizer", "one with a mask token, to fit an encoder", tokenizer
    )
    assert mask_token is not None
    return MaskedStream(flat, vocab_size, int(mask_token))
