"""Text from a fitted model: the prompt in one pass, then a token at a time from the cache, routes executed."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.config import require
from bayes_router.transformer.model import Force, RoutedLanguageModel
from bayes_router.types import RoutingMode


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: draw from the k likeliest tokens; 0 from all.
        top_p: draw from the smallest set of likeliest tokens that holds this probability.
        seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.temperature >= 0, "temperature", "0 (greedy) or more", self.temperature)
        require(self.top_k >= 0, "top_k", "0 (all tokens) or more", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "a probability above 0", self.top_p)


class GeneratedToken(NamedTuple):
    """One step of generation for a batch."""

    tokens: Tensor  # [B] int64
    route: Tensor  # [L, B], the expert that the token before it took


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row, [B], from logits [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, ids = (logits.float() / sampling.temperature).sort(-1, descending=True)
    probability = ordered.softmax(-1)
    drop = probability.cumsum(-1) - probability >= sampling.top_p  # the likeliest token always stays
    if sampling.top_k:
        drop[:, sampling.top_k :] = True
    kept = probability.masked_fill(drop, 0.0)
    place = torch.multinomial(kept, 1, generator=generator)
    return ids.gather(-1, place).squeeze(-1)


@torch.no_grad()
def stream(
    model: RoutedLanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop_tokens: Collection[int] = (),
    force: Force | None = None,
) -> Iterator[GeneratedToken]:
    """Yield the tokens that follow `prompt` int64 [B, T], one step at a time, under the model's hard policy.

    A row that has met a stop token goes on repeating it; the stream ends when all rows have.

    Raises:
        ValueError: an empty prompt, token ids out of the vocabulary, or max_new_tokens below 1.
    """
    require(prompt.dim() == 2 and prompt.shape[1] >= 1, "prompt", "at least one token, shape [B, T]", tuple(prompt.shape))
    require(max_new_tokens >= 1, "max_new_tokens", "at least 1", max_new_tokens)
    sampling = sampling or Sampling()
    generator = torch.Generator(prompt.device).manual_seed(sampling.seed)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=prompt.device)
    finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    cache = model.network.new_cache(len(prompt), prompt.shape[1] + max_new_tokens)
    tokens, last = prompt, prompt[:, -1]
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            out = model(tokens, RoutingMode.HARD, force=force, cache=cache, last_only=True)
            last = torch.where(finished, last, choose_token(out.logits[:, -1], sampling, generator))
            route = out.route if not out.route.is_floating_point() else out.route.argmax(-1)
            yield GeneratedToken(last, route[:, :, -1])
            finished = finished | torch.isin(last, stops)
            if len(stops) and bool(finished.all()):
                return
            tokens = last[:, None]
    finally:
        model.train(was_training)


def generate(
    model: RoutedLanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop_tokens: Collection[int] = (),
    force: Force | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompt and continuation int64 [B, T + N], and the routes [L, B, N] that led to each new token; see `stream`."""
    steps = list(stream(model, prompt, max_new_tokens, sampling, stop_tokens=stop_tokens, force=force))
    tokens = torch.stack([step.tokens for step in steps], 1)
    return torch.cat([prompt, tokens], 1), torch.stack([step.route for step in steps], -1)
