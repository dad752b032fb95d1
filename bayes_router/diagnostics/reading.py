"""One pass over held-out text.

Posteriors, routes, losses, and the windows that they were read on.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.config import Config
from bayes_router.data.tokenisers import Tokeniser
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.nll import token_nll
from bayes_router.types import IGNORED, RoutingMode


class Reading(NamedTuple):
    """A batch of windows as a model read them."""

    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], -100 is not scored
    nll: Tensor  # [B, T], nats of the targets; 0 where not scored
    concentration: Tensor  # float32 [L, B, T, R, E]
    hard_choice: Tensor  # int64 [L, B, T, R], what the model's policy takes given that path

    def own_nll(self, causal: bool = True) -> Tensor:
        """[B, T], nats of each token itself, nan where it was not predicted.

        Said a token before, or where it was hidden.
        """
        nll = self.nll.masked_fill(self.targets == IGNORED, torch.nan)
        return (
            torch.cat([torch.full_like(nll[:, :1], torch.nan), nll[:, :-1]], 1) if causal else nll
        )


@torch.no_grad()
def read(
    model: RoutedLanguageModel, batches: Iterator[Batch], mode: RoutingMode = RoutingMode.HARD
) -> Iterator[Reading]:
    """Run `model` over batches one at a time; nothing is kept between them.

    The posterior of a layer depends on the routes executed below it, so `mode` says along which
    path it is read: HARD is what is deployed.
    """
    device = next(model.parameters()).device
    for batch in batches:
        tokens, targets = (x.to(device) for x in batch)
        out = model(tokens, mode)
        nll = token_nll(out.logits, targets)
        choice = out.route if mode is RoutingMode.HARD else model.policy(out.concentration)
        yield Reading(tokens, targets, nll, out.concentration, choice)


def windows(source: TokenSource, config: Config, limit: int | None = None) -> Iterator[Batch]:
    """Windows of the run's context and batch size, at least one.

    At most `limit` tokens, by default the run's eval_tokens.
    """
    context = config.data.context
    return source.windows(
        context, config.train.batch_size, max(limit or config.data.eval_tokens, context)
    )


def text_windows(
    text: bytes, tokeniser: Tokeniser, context: int, limit: int | None = None, causal: bool = True
) -> Iterator[Batch]:
    """All of a text, window by window, the last one as short as it comes.

    Every token is in exactly one.

    The last token of all has nothing to predict, so its target is not scored; for an encoder, from
    which nothing is hidden here, none is.

    Raises:
        ValueError: an empty text, or one that is not UTF-8.
    """
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: expected UTF-8; got an invalid byte at {error.start}; convert the file"
        ) from error
    ids = torch.from_numpy(tokeniser.encode(text).astype("int64"))[:limit]
    require(
        len(ids) > 0, "text", "at least one token", "an empty text", "name a file with text in it"
    )
    targets = (
        torch.cat([ids[1:], ids.new_tensor([IGNORED])]) if causal else torch.full_like(ids, IGNORED)
    )
    pairs = zip(ids.split(context), targets.split(context), strict=True)
    return (Batch(part[None], target[None]) for part, target in pairs)


def pieces(ids: list[int], tokeniser: Tokeniser | None) -> list[str]:
    """What each token shows.

    A character that spans tokens is shown at its last; the tokens before it show nothing.
    """
    if tokeniser is None:
        return [f"{token} " for token in ids]
    shown, pending = [], []
    for token in ids:
        pending.append(token)
        text = tokeniser.decode(pending)
        # no character has more than 4 bytes
        whole = not text.endswith("\ufffd") or len(pending) > 3
        shown.append(text if whole else "")
        pending = [] if whole else pending
    if pending:
        shown[-1] = tokeniser.decode(pending)
    return shown
