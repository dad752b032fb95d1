"""Routers are saved and loaded as Hugging Face's models are: from a folder, a repository, a cache.

With a card.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

huggingface_hub = pytest.importorskip("huggingface_hub")

from bayes_router import Router, RouterConfig, patch  # noqa: E402
from tests.integrations.tiny_models import DECODERS  # noqa: E402

TEXT = torch.arange(1200) % 97


def fitted(folder: Path) -> torch.Tensor:
    """What a fitted router on a budget says; it is saved."""
    torch.manual_seed(0)
    model = DECODERS["llama"]().eval()
    router = patch(model, window=8, sinks=2, experts=("full", "local"))
    router.fit(TEXT, steps=3, distil_steps=0, context=32, batch_size=2, budget=0.7)
    router.set_budget(0.6, context=32)
    router.save_pretrained(folder)
    return model(TEXT[None, :40]).logits


def original() -> torch.nn.Module:
    torch.manual_seed(0)
    return DECODERS["llama"]().eval()


def test_from_a_folder_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = fitted(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    model = original()
    router = Router.from_pretrained(model, tmp_path)
    torch.testing.assert_close(model(TEXT[None, :40]).logits, want)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| {router.fitted.tokens:,} tokens, 32 a sequence |" in card and "| 0.7 |" in card
    assert "library_name: bayes-router" in card.split("---")[1] and "Budget(" in card


def test_its_card_says_loss_and_cost_of_the_end_of_the_fit(tmp_path: Path) -> None:
    router = patch(original(), window=8)
    frame = router.fit(TEXT, steps=12, distil_steps=0, context=32, batch_size=2, budget=0.7)
    router.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    last = frame.tail(5)
    for name, words in (
        ("nll", "loss, nats per token"),
        ("cost", "executed cost in FLOPs of attention, full"),
    ):
        said = f"| {last[name].mean():.4f} +- {last[name].sem():.4f} |"
        assert any(words in row and said in row for row in card.splitlines()), (words, said)
    assert "(the last 5 steps of the fit, on its own text)" in card
    again = Router.from_pretrained(original(), tmp_path)
    assert again.fitted == router.fitted and again.fitted.read["steps"] == 5


def test_an_unfitted_card_says_so_and_anothers_stays(tmp_path: Path) -> None:
    router = patch(original(), window=8)
    router.save(tmp_path / "a")
    assert "Not fitted" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "README.md").write_text("mine", encoding="utf-8")
    router.save(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text(encoding="utf-8") == "mine"


def test_to_a_repository_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = fitted(tmp_path / "mine")
    asked: list[Any] = []

    class Hub:
        def __init__(self, token: str | None):
            asked.append(token)

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            asked.append((name, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            Path(folder_path).rename(tmp_path / "hub")
            Path(folder_path).mkdir()
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub")
    )
    model = original()
    address = Router.from_pretrained(model, tmp_path / "mine").push_to_hub("somebody/router")
    assert address.endswith("somebody/router") and asked == [None, ("somebody/router", True, True)]
    again = original()
    Router.from_pretrained(again, "somebody/router")
    torch.testing.assert_close(again(TEXT[None, :40]).logits, want)
    assert not (tmp_path / "hub" / "held_out.safetensors").exists()


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="folder_or_name: expected a folder, or a repository of the hub; got no/where: ",
    ):
        Router.from_pretrained(original(), "no/where", local_files_only=True)
    with pytest.raises(ValueError, match="folder: expected a saved patch"):
        Router.from_pretrained(original(), tmp_path / "none")


def test_the_settings_travel_without_the_model(tmp_path: Path) -> None:
    fitted(tmp_path)
    config = RouterConfig.from_pretrained(tmp_path)
    assert config == RouterConfig(window=8, sinks=2, experts=("full", "local"))
    assert RouterConfig.from_json(config.to_json()) == config
    model = original()
    assert patch(model, config=config).settings == config
    with pytest.raises(ValueError, match="config: expected no settings beside it"):
        patch(original(), config=config, window=9)
    with pytest.raises(ValueError, match="RouterConfig: expected one of .*; got 'widow'.*window"):
        RouterConfig.from_dict({"widow": 3})
    with pytest.raises(ValueError, match="folder_or_name: expected a folder with router.json"):
        RouterConfig.from_pretrained(tmp_path / "none")
    (tmp_path / "router.json").write_text("{}")
    with pytest.raises(ValueError, match="router.json: expected the settings of a router"):
        RouterConfig.from_pretrained(tmp_path)
