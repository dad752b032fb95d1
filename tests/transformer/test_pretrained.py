"""A fitted model is saved and loaded as Hugging Face's models are, and answers as before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_router import RoutedLanguageModel, Sampling, generate, hub
from bayes_router.files import PRETRAINED, SUMMARY, WEIGHTS
from bayes_router.routing.policy import Conservative
from tests.tiny import tiny_batch, tiny_model

TOKENS = tiny_batch()[0]


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


def test_a_model_comes_back_with_its_policy_and_says_the_same(tmp_path: Path) -> None:
    model = tiny_model(route_by="head").eval()
    model.policy = Conservative((1.0, 0.15, 0.2, 0.3), 0.6)
    model.save_pretrained(tmp_path)
    again = RoutedLanguageModel.from_pretrained(tmp_path)
    want, got = model(TOKENS), again(TOKENS)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.route, want.route)
    assert again.policy == model.policy and again.config == model.config
    assert not again.training
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Conservative(" in card and "How it was fitted is not known" in card


def test_a_run_folder_is_one_and_its_figures_are_on_the_card(run: Path, tmp_path: Path) -> None:
    model = RoutedLanguageModel.from_pretrained(run)
    assert model.controller.evidence is not None
    model.save_pretrained(tmp_path / "copy")
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    again = RoutedLanguageModel.from_pretrained(tmp_path / "copy")
    assert again.summary == summary and again.controller.evidence is not None
    card = (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    assert f"hard {summary['nll']['hard']:.4f}" in card and "1,536 tokens read" in card
    prompt = TOKENS[:, :9]
    greedy = Sampling(temperature=0)
    want, got = (generate(one, prompt, 6, greedy) for one in (model, again))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_a_run_of_before_has_no_config_json(run: Path, tmp_path: Path) -> None:
    for name in ("config.toml", WEIGHTS):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert RoutedLanguageModel.from_pretrained(tmp_path).config.num_layers == 2


def test_to_a_repository_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hubs = pytest.importorskip("huggingface_hub")
    sent: list[Any] = []

    class Hub:
        def __init__(self, token: str | None):
            pass

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            sent.append((name, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            Path(folder_path).rename(tmp_path / "hub")
            Path(folder_path).mkdir()
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hubs, "HfApi", Hub)
    monkeypatch.setattr(hubs, "snapshot_download", lambda name, **_: str(tmp_path / "hub"))
    model = tiny_model().eval()
    assert model.push_to_hub("somebody/model").endswith("somebody/model")
    assert sent == [("somebody/model", True, True)]
    again = RoutedLanguageModel.from_pretrained("somebody/model")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert all(not pattern.endswith((".py", ".bin", ".pt")) for pattern in hub.KEPT)


def damaged(change: dict[str, Any], folder: Path) -> None:
    values = json.loads((folder / PRETRAINED).read_text(encoding="utf-8"))
    for name, value in change.items():
        if isinstance(value, dict):
            values[name] |= value
        else:
            values[name] = value
    (folder / PRETRAINED).write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type: expected 'bayes_router'; got 'llama'"),
        ({"model": {"window": 7}}, "model.window is 7, was 5"),
        ({"model": {"wings": 7}}, r"model.\*: expected one of .*; got 'wings'"),
        ({"model": 3}, "model: expected a table of settings; got 3"),
        ({"policy": {"name": "argmin"}}, "expected one of .*; got 'argmin'"),
        ({"policy": {"sure": 1}}, "policy: expected the fields of"),
        ({"policy": None}, "policy: expected a name and fields"),
    ],
)
def test_what_was_changed_by_hand_is_named(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    damaged(change, tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        RoutedLanguageModel.from_pretrained(tmp_path)
    assert PRETRAINED in str(caught.value)


def test_a_flipped_bit_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder_or_name: expected a folder with config.json"):
        RoutedLanguageModel.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-9] ^= 4
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: .*checksum"):
        RoutedLanguageModel.from_pretrained(tmp_path)
