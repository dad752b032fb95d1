"""What the studies of pretrained models load, and how long a part of one took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayes_router.data.stream import TokenStream
from bayes_router.integrations.huggingface.loading import load_base


@cache
def load_model(folder: Path, device: torch.device, dtype: str = "auto") -> Any:
    """The pretrained model in evaluation mode.

    By default in bfloat16 on a GPU and float32 on a CPU. Where its configuration names a
    `first_token`, every text begins with that in place of its own first token.
    """
    gguf = next((file.name for file in folder.glob("*.gguf")), None)
    kind = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    model = load_base(str(folder), gguf, device, dtype=getattr(torch, kind))
    first = getattr(model.config, "first_token", None)
    if first is not None:

        def begin(module: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            tokens = given[0].clone()
            tokens[:, 0] = first
            return (tokens,)

        model.get_input_embeddings().register_forward_pre_hook(begin)
    return model


def load_streams(path: Path, vocab_size: int) -> dict[str, TokenStream]:
    """The texts by name."""
    with np.load(path) as held:
        return {
            name: TokenStream(torch.from_numpy(held[name].astype(np.int64)), vocab_size, name)
            for name in held.files
        }


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say how long it took."""
    started = time.perf_counter()
    yield
    print(f"[{name}: {time.perf_counter() - started:.1f} s]", flush=True)
