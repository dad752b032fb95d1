"""A pretrained model whose vocabulary is cut to the tokens of some texts.

    python -m analysis.pretrained.cut_vocabulary MODEL TOKENS.npz OUT

MODEL is a folder of a checkpoint (or of its GGUF file), TOKENS.npz is written by
`analysis.pretrained.texts` with its tokenizer. OUT gets the checkpoint with the rows of the tokens
that occur there or in prompts of retrieval alone, the beginning of texts among them, tokens.npz,
the same texts in the new ids, and a tokenizer that gives these ids. Of Gemma 3 270M, whose 262,144
rows are two thirds of its weights, a sixth is left. Next-token distributions are then over the
tokens that are left, of the model and of what is routed alike.

The new configuration's `first_token` is the beginning of texts, without which Gemma reads badly:
`analysis.pretrained.loading` puts it in front of every window.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from analysis.pretrained.loading import load_model
from analysis.pretrained.reading import LONGEST
from analysis.pretrained.retrieval import TASKS, Haystack, prompts
from analysis.pretrained.study import haystack
from bayes_router.data.stream import TokenStream
from bayes_router.files import write_whole

PROMPTS = 24  # of each task and length, whose tokens are kept


def renumbered(
    texts: dict[str, np.ndarray], also: list[int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(old ids that occur and those of `also`, sorted; the texts in places of that list)."""
    old = np.unique(np.concatenate([*(np.unique(ids) for ids in texts.values()), also]))
    kind = np.min_scalar_type(len(old))
    return old, {name: np.searchsorted(old, ids).astype(kind) for name, ids in texts.items()}


def asked(hay: Haystack, lengths: tuple[int, ...], count: int = PROMPTS) -> list[int]:
    """Ids that prompts of every task hold, and every word that they may list."""
    found = {token for word in hay.words for token in hay.encode(f" {word}")}
    for task in TASKS:
        for length in lengths:
            found |= {token for one in prompts(task, hay, length, count) for token in one.tokens}
    return sorted(found)


def cut_tokenizer(tokenizer: Tokenizer, old: np.ndarray) -> Tokenizer:
    """A byte-pair tokenizer that says of text made of the tokens `old` the same, in the new ids.

    Merges that lead to one of these are kept, and tokens that only stand between, whose ids lie
    beyond those of the vocabulary.
    """
    whole = json.loads(tokenizer.to_str())
    model = whole["model"]
    name = {number: token for token, number in model["vocab"].items()}
    kept = [name[number] for number in old.tolist()]
    parts = defaultdict[str, list[tuple[str, str]]](list)
    for left, right in model["merges"]:
        parts[left + right].append((left, right))
    needed, waiting = dict.fromkeys(kept), list(kept)
    for token in (model["unk_token"], *(t for t in model["vocab"] if t.startswith("<0x"))):
        needed.setdefault(token)
    while waiting:
        for pair in parts[waiting.pop()]:
            waiting += [token for token in pair if token not in needed]
            needed.update(dict.fromkeys(pair))
    model["vocab"] = {token: number for number, token in enumerate(needed)}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in needed]
    held = [one for one in whole["added_tokens"] if one["content"] in model["vocab"]]
    whole["added_tokens"] = [one | {"id": model["vocab"][one["content"]]} for one in held]
    whole["post_processor"] = None
    return Tokenizer.from_str(json.dumps(whole))


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
        roles = ("fit ", "read ", "other ")
        texts = {name: held[name] for name in held.files if name.startswith(roles)}
    first = model.config.bos_token_id
    gguf = next(iter(args.model.glob("*.gguf")), None)
    tokenizer = AutoTokenizer.from_pretrained(
        args.model, **({} if gguf is None else {"gguf_file": gguf.name})
    )
    also, lengths = [first], (LONGEST, LONGEST // 2, LONGEST // 4)
    for name in ("fit novels", "read novels"):
        ids = torch.from_numpy(texts[name].astype(np.int64))
        hay = haystack(tokenizer, TokenStream(ids, model.config.vocab_size, name))
        also += asked(hay, lengths)
    old, new = renumbered(texts, also)
    PreTrainedTokenizerFast(
        tokenizer_object=cut_tokenizer(tokenizer.backend_tokenizer, old)
    ).save_pretrained(args.out)
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
