"""Loading the pretrained model that a saved patch belongs to.

And its tokenizer as the project reads one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayes_router.checks import get_extra
from bayes_router.data.tokenisers import Ids

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
REPLACEMENT = "\ufffd"


class PretrainedTokeniser:
    """A Hugging Face tokenizer behind the `Tokeniser` protocol.

    Special tokens are neither added nor hidden.

    Ids of the model beyond the tokenizer's vocabulary (embeddings are often padded) show as a
    replacement character.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.mask_token: int | None = getattr(tokenizer, "mask_token_id", None)
        self.name = str(getattr(tokenizer, "name_or_path", "") or "pretrained")
        self._known = len(tokenizer)

    def encode(self, text: bytes) -> npt.NDArray[Any]:
        """Ids [T] of UTF-8 text, int32."""
        ids = self.tokenizer(text.decode("utf-8"), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Ids) -> str:
        """The text of ids [T]; a word that begins a SentencePiece token keeps its space."""
        numbers = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids)]
        if any(i >= self._known for i in numbers):
            return REPLACEMENT
        text: str = self.tokenizer.decode(
            numbers, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        first = self.tokenizer.convert_ids_to_tokens(numbers[:1])
        return (
            f" {text.lstrip(' ')}"
            if first and str(first[0]).startswith("\u2581") and not text.startswith(" ")
            else text
        )


def load_base(
    base: str,
    gguf_file: str | None,
    device: torch.device,
    kind: str = "",
    dtype: torch.dtype | None = None,
) -> Any:
    """The language model in a folder or of a name, in evaluation mode.

    Args:
        base: folder or name.
        gguf_file: its GGUF file, where the weights are one.
        device: where it is put.
        kind: the class that the patch was made for: with a masked head, or with a causal one.
        dtype: of the weights; default their own on a GPU, float32 on a CPU.

    Raises:
        ValueError: transformers is not installed, or there is no such model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    except ImportError as error:
        raise ValueError(
            f"base: expected the package transformers; got none; {get_extra('hf')}"
        ) from error
    taken = dtype or ("auto" if device.type == "cuda" else torch.float32)
    try:
        auto = AutoModelForMaskedLM if kind.endswith("ForMaskedLM") else AutoModelForCausalLM
        model: Any = auto.from_pretrained(base, dtype=taken, **_gguf(base, gguf_file))
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"base: expected the folder or the name of a Hugging Face language model; got "
            f"{base!r}: {reason}; correct it, "
            "or name its GGUF file with --gguf_file"
        ) from error
    return model.to(device).eval()


def load_tokeniser_of(
    base: str, gguf_file: str | None, vocab_size: int
) -> PretrainedTokeniser | None:
    """The tokenizer beside a model; None where there is none."""
    from transformers import AutoTokenizer

    gguf, folder = _gguf(base, gguf_file), Path(base)
    if (
        folder.is_dir()
        and not gguf
        and not any((folder / name).is_file() for name in TOKENIZER_FILES)
    ):
        return None
    try:
        return PretrainedTokeniser(AutoTokenizer.from_pretrained(base, **gguf), vocab_size)
    except (OSError, ValueError, ImportError, KeyError):
        return None


def _gguf(base: str, gguf_file: str | None) -> dict[str, str]:
    """The keyword for a GGUF file.

    The one named, or the only one in a folder without a config.json.

    Raises:
        ValueError: there are several, and none was named.
    """
    if gguf_file is not None:
        return {"gguf_file": gguf_file}
    folder = Path(base)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return {}
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(
            f"gguf_file: expected the name of one file; {base} has {', '.join(found)}; name one "
            f"with --gguf_file"
        )
    return {"gguf_file": found[0]} if found else {}
