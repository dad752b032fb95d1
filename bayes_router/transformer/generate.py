"""Text from a fitted model.

The prompt in one pass, then a token at a time from the cache, routes executed.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayes_router.checks import require
from bayes_router.routing.force import forced_route
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.padding import check_lengths, check_tokens, last_token, real_tokens
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
    route: Tensor  # [L, B, R], the experts that the token before it took


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row, [B], from logits [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, ids = (logits.float() / sampling.temperature).sort(-1, descending=True)
    probability = ordered.softmax(-1)
    # the likeliest token always stays
    drop = probability.cumsum(-1) - probability >= sampling.top_p
    if sampling.top_k:
        drop[:, sampling.top_k :] = True
    kept = probability.masked_fill(drop, 0.0)
    place = torch.multinomial(kept, 1, generator=generator)
    return ids.gather(-1, place).squeeze(-1)


Prompt = Tensor | Sequence[Tensor]
"""int64 [B, T], or one [T] for each row."""


def stream(
    model: RoutedLanguageModel,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    lengths: Tensor | None = None,
    stop_tokens: Collection[int] = (),
    force: str | None = None,
) -> Iterator[GeneratedToken]:
    """Yield the tokens that follow each row of `prompt`, one step at a time.

    Routes are those of the model's hard policy.

    A row that has met a stop token goes on repeating it; the stream ends when all rows have.

    Args:
        model: put into evaluation mode while the stream runs.
        prompt: int64 [B, T], or a list of B tensors int64 [T_b].
        max_new_tokens: of each row.
        sampling: default `Sampling()`.
        lengths: [B] real tokens of each row of a tensor; the rest is right padding, whatever its
            ids. Default all.
        stop_tokens: ids after which a row has ended.
        force: the name of the expert that every token takes.

    Raises:
        ValueError: at the call: a prompt that is empty, on another device or no tensor of ids of
            the vocabulary; lengths that do not fit; stop tokens out of the vocabulary;
            max_new_tokens below 1; an unknown expert.
    """
    tokens, real = _rows(model, prompt, lengths)
    vocab, config = model.config.vocab_size, model.config
    require(max_new_tokens >= 1, "max_new_tokens", "at least 1", max_new_tokens)
    stops = sorted(stop_tokens)
    require(
        all(0 <= stop < vocab for stop in stops), "stop_tokens", f"ids from 0 to {vocab - 1}", stops
    )
    require(
        force is None or isinstance(force, str),
        "force",
        "the name of an expert",
        type(force).__name__,
    )
    if force is not None:
        forced_route(force, config.experts, config.num_layers, config.num_units)
    return _steps(model, tokens, real, max_new_tokens, sampling or Sampling(), stops, force)


@torch.no_grad()
def _steps(
    model: RoutedLanguageModel,
    tokens: Tensor,
    lengths: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: list[int],
    force: str | None,
) -> Iterator[GeneratedToken]:
    """The steps of a checked `stream`: the prompt in one pass, then each row's own last token."""
    B, T = tokens.shape
    generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    stops = torch.tensor(stop_tokens, dtype=torch.int64, device=tokens.device)
    finished = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    cache = model.new_cache(B, T + max_new_tokens)
    last = last_token(tokens, lengths)[:, 0]
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            out = model(
                tokens, RoutingMode.HARD, force=force, cache=cache, last_only=True, lengths=lengths
            )
            last = torch.where(finished, last, choose_token(out.logits[:, -1], sampling, generator))
            yield GeneratedToken(last, last_token(out.route, lengths, dim=2)[:, :, 0])
            # a row that has ended repeats its stop token, so it stays so
            finished = torch.isin(last, stops)
            if stop_tokens and bool(finished.all()):
                return
            tokens, lengths = last[:, None], None
    finally:
        model.train(was_training)


def generate(
    model: RoutedLanguageModel,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    lengths: Tensor | None = None,
    stop_tokens: Collection[int] = (),
    force: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompt and continuation int64 [B, T + N], and the routes of each new token.

    The routes are [L, B, N, R]; see `stream`.

    A row shorter than T is followed by its N new tokens at once, and then by zeros.
    """
    options: dict[str, Any] = {"lengths": lengths, "stop_tokens": stop_tokens, "force": force}
    steps = list(stream(model, prompt, max_new_tokens, sampling, **options))
    tokens, real = _rows(model, prompt, lengths)
    new = torch.stack([step.tokens for step in steps], 1)  # [B, N]
    out = torch.cat([tokens, torch.zeros_like(new)], 1)
    start = torch.full_like(tokens[:, :1], tokens.shape[1]) if real is None else real[:, None]
    place = start + torch.arange(new.shape[1], device=new.device)
    return out.scatter(1, place, new), torch.stack([step.route for step in steps], 2)


def _rows(
    model: RoutedLanguageModel, prompt: Prompt, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Checked tokens [B, T] with zeros for padding, and the lengths [B] of rows that may differ."""
    vocab, device = model.config.vocab_size, model.network.embed.weight.device
    if not isinstance(prompt, Tensor):
        require(
            isinstance(prompt, Sequence),
            "prompt",
            "a tensor [B, T] or a list of tensors [T]",
            type(prompt).__name__,
        )
        for row in prompt:
            fine = isinstance(row, Tensor) and row.dim() == 1 and len(row) > 0
            require(
                fine,
                "prompt",
                "a tensor [B, T] or a list of tensors [T], at least one token each",
                row,
            )
            check_tokens(row[None], vocab, device, "prompt")
        require(len(prompt) > 0, "prompt", "at least one row", prompt)
        require(lengths is None, "lengths", "None with a list of prompts", lengths)
        lengths = torch.tensor([len(row) for row in prompt], device=device)
        prompt = pad_sequence(list(prompt), batch_first=True)
    require(
        prompt.dim() == 2 and prompt.shape[1] >= 1,
        "prompt",
        "at least one token, shape [B, T]",
        tuple(prompt.shape),
    )
    if lengths is not None:
        check_lengths(lengths, prompt, least=1)
        prompt, lengths = (
            torch.where(real_tokens(lengths, prompt.shape[1]), prompt, 0),
            lengths.to(torch.int64),
        )
    check_tokens(prompt, vocab, device, "prompt")
    return prompt, lengths
