"""A pretrained model whose vocabulary is cut to the tokens of some texts.

    python -m analysis.pretrained.cut_vocabulary MODEL TOKENS.npz OUT

MODEL is a folder of a checkpoint (or of its GGUF file), TOKENS.npz is written by
`analysis.pretrained.texts` with its tokenizer. OUT gets the checkpoint with the rows of the tokens
that occur there alone, the beginning of texts among them, and tokens.npz, the same texts in the new
ids. Of Gemma 3 270M, whose 262,144 rows are two thirds of its weights, a sixth is left. Next-token
distributions are then over the tokens that are left, of the model and of what is routed alike.

The new configuration's `first_token` is the beginning of texts, without which Gemma reads badly:
`analysis.pretrained.loading` puts it in front of every window.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from analysis.pretrained.loading import load_model
from bayes_router.files import write_whole


def renumbered(
    texts: dict[str, np.ndarray], first: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(old ids that occur and `first`, sorted; the texts in places of that list)."""
    old = np.unique(np.concatenate([*(np.unique(ids) for ids in texts.values()), [first]]))
    kind = np.min_scalar_type(len(old))
    return old, {name: np.searchsorted(old, ids).astype(kind) for name, ids in texts.items()}


def cut(model: Any, old: np.ndarray, first: int) -> None:
    """Leave the rows `old` of the vocabulary, in their order; texts begin with `first` of these."""
    rows = torch.from_numpy(old.astype(np.int64))
    before = model.get_input_embeddings().weight
    tied = before is model.get_output_embeddings().weight
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.weight = nn.Parameter(part.weight.detach()[rows].clone())
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.get_input_embeddings().num_embeddings = len(old)
    model.get_input_embeddings().padding_idx = None
    model.get_output_embeddings().out_features = len(old)
    config = model.config
    config.vocab_size, config.first_token = len(old), int(np.searchsorted(old, first))
    config.pad_token_id = config.eos_token_id = config.bos_token_id = None


def main() -> None:
    """Read, cut, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    model = load_model(args.model, torch.device("cpu"), "bfloat16")
    with np.load(args.tokens) as held:
        texts = {name: held[name] for name in held.files}
    first = model.config.bos_token_id
    old, new = renumbered(texts, first)
    print(f"{len(old):,} of {model.config.vocab_size:,} tokens occur")
    cut(model, old, first)
    if hasattr(model.config, "quantization_config"):  # its weights are plain numbers here
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.generation_config = GenerationConfig()
    model.save_pretrained(args.out)
    write_whole(
        args.out / "tokens.npz",
        lambda path: np.savez_compressed(path.open("wb"), allow_pickle=False, **new),
    )


if __name__ == "__main__":
    sys.exit(main())
