"""A model trained here behind transformers' interface: it answers alike, or refuses by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", minversion="5.0")

import bayes_router  # noqa: E402
from bayes_router import RoutedLanguageModel, Sampling  # noqa: E402
from bayes_router.integrations.huggingface.causal import (  # noqa: E402
    RoutedConfig,
    RoutedForCausalLM,
)
from tests.tiny import tiny_batch, tiny_model  # noqa: E402

TOKENS = tiny_batch(B=3, T=24)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    tiny_model(route_by="kv_head").save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def ours(folder: Path) -> RoutedLanguageModel:
    return RoutedLanguageModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_auto_opens_the_folder_and_the_logits_are_those_of_hard(
    ours: RoutedLanguageModel, theirs: Any, folder: Path
) -> None:
    assert type(theirs) is RoutedForCausalLM and not theirs.training
    assert isinstance(transformers.AutoConfig.from_pretrained(folder), RoutedConfig)
    want, got = ours(TOKENS, "hard"), theirs(TOKENS)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.route, want.route)
    assert len(got.route.unique()) > 1
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_labels_give_the_loss_of_hard(ours: RoutedLanguageModel, theirs: Any) -> None:
    labels = TOKENS.clone()
    labels[0, :5] = -100
    want = F.cross_entropy(
        ours(TOKENS).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(theirs(TOKENS, labels=labels).loss, want)
    theirs.train()
    with pytest.raises(ValueError, match="labels: expected evaluation mode.*bayes_router.fit"):
        theirs(TOKENS, labels=labels)
    theirs.eval()


def test_padding_on_the_right_changes_nothing(theirs: Any) -> None:
    mask = torch.ones_like(TOKENS)
    mask[1, 15:] = 0
    padded = TOKENS.masked_fill(mask == 0, 0)
    torch.testing.assert_close(
        theirs(padded, attention_mask=mask).logits[1, :15], theirs(TOKENS[1:2, :15]).logits[0]
    )
    last = theirs(padded, attention_mask=mask, logits_to_keep=1).logits
    torch.testing.assert_close(last[1, 0], theirs(TOKENS[1:2, :15]).logits[0, -1])


def test_greedy_is_that_of_the_library(ours: RoutedLanguageModel, theirs: Any) -> None:
    want, _ = bayes_router.generate(ours, TOKENS[:, :10], 12, Sampling(temperature=0))
    got = theirs.generate(TOKENS[:, :10], max_new_tokens=12, do_sample=False)
    assert torch.equal(got, want)
    slow = theirs.generate(TOKENS[:, :10], max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(slow, want)


def sequence_loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits[:, 9:-1].log_softmax(-1)
    return logits.gather(-1, tokens[:, 10:, None]).sum((1, 2))


def test_beams_are_reordered_with_their_cache(theirs: Any) -> None:
    """A beam that kept another row's cache would score what it did not read."""
    prompt = TOKENS[:, :10]
    out = theirs.generate(
        prompt, max_new_tokens=8, num_beams=3, do_sample=False,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    plain = theirs.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(out.sequences, plain)
    torch.testing.assert_close(
        out.sequences_scores * 8, sequence_loss(theirs, out.sequences), rtol=1e-4, atol=1e-4
    )


def test_saved_again_it_is_the_same(theirs: Any, ours: RoutedLanguageModel, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    again = RoutedLanguageModel.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, ours(TOKENS).logits)


def refused(theirs: Any, folder: Path) -> dict[str, Any]:
    left = torch.ones_like(TOKENS)
    left[0, :3] = 0
    auto = transformers.AutoModelForCausalLM
    return {
        "inputs_embeds": lambda: theirs(TOKENS, inputs_embeds=torch.zeros(3, 24, 16)),
        "output_attentions": lambda: theirs(TOKENS, output_attentions=True),
        "position_ids": lambda: theirs(TOKENS, position_ids=TOKENS),
        "attention_mask": lambda: theirs(TOKENS, attention_mask=left),
        "attention_mask ": lambda: theirs.generate(TOKENS, attention_mask=left, max_new_tokens=2),
        "cache_implementation": lambda: theirs.generate(
            TOKENS, max_new_tokens=2, cache_implementation="static"
        ),
        "quantization_config": lambda: auto.from_pretrained(
            folder, quantization_config={"load_in_8bit": True}
        ),
        "device_map": lambda: auto.from_pretrained(folder, device_map={"a": 0, "b": "cpu"}),
        "embeddings": lambda: theirs.resize_token_embeddings(50),
        "max_shard_size": lambda: theirs.save_pretrained(folder, max_shard_size="1GB"),
    }


@pytest.mark.parametrize(
    "name",
    ["inputs_embeds", "output_attentions", "position_ids", "attention_mask", "attention_mask ",
     "cache_implementation", "quantization_config", "device_map", "embeddings", "max_shard_size"],
)  # fmt: skip
def test_what_is_not_honest_is_refused_by_name(theirs: Any, folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name.strip()}: expected"):
        refused(theirs, folder)[name]()
