"""lm-evaluation-harness on a patched model: a task of one's own, from a local file.

`pip install lm_eval` first. The harness is given the model that was patched, so what it scores is
what the router executes. Nothing is downloaded: the model is a tiny one of random weights, its
tokenizer is bytes; `AutoModelForCausalLM.from_pretrained(NAME)` and its own stand in their place.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bayes_router import patch

SPEECH = "The state of the Union is strong. The Congress shall have power to lay taxes. " * 20
QUESTIONS = [("The state of the", " Union", " taxes"), ("The Congress shall have", " power", " is")]
TASK: dict[str, Any] = {
    "task": "next_word",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters[0])


def main(folder: str) -> dict[str, float]:
    """Accuracy of the unpatched model, and at a budget; the questions are written to `folder`."""
    torch.manual_seed(0)
    rows = [{"context": text, "choices": [right, wrong]} for text, right, wrong in QUESTIONS]
    file = Path(folder) / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(file)}}}
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, intermediate_size=96, **sizes))
    tokens = tokenizer(SPEECH, return_tensors="pt")["input_ids"]
    harness = HFLM(model.eval(), tokenizer=tokenizer, backend="causal", batch_size=1)

    def accuracy() -> float:
        found = simple_evaluate(harness, tasks=[task], bootstrap_iters=0)
        return float(found["results"]["next_word"]["acc,none"])

    scores = {"unpatched": accuracy()}
    router = patch(model, window=16, sinks=4, experts=("full", "local"))
    router.fit(tokens[0], steps=5, distil_steps=0, context=64, batch_size=2, budget=0.7)
    return scores | {"routed": accuracy()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        print(main(own))
