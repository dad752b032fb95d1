"""Patches that come with the package, and the figures of their cards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from analysis.pretrained.card import figures
from analysis.pretrained.contenders import share
from bayes_router.commands.arguments import report
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.patch.shipped import SHIPPED, folder_of, shipped
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.routing.policy import Budget
from tests.integrations.tiny_models import VOCAB, tiny, tokens

NAMES = [
    "smollm2-135m",
    "smollm2-135m-range",
    "smollm2-135m-window256",
    "smollm2-135m-teacher",
    "smollm2-135m-text",
]


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_controllers_and_a_card_that_says_how_it_was_read(name: str) -> None:
    assert name in shipped()
    folder = folder_of(name)
    saved, weights = (
        json.loads((folder / "router.json").read_text()),
        load_file(folder / "router.safetensors"),
    )
    assert len(weights) == 60 and all(torch.isfinite(x).all() for x in weights.values())
    assert weights["controller.layers.0.out.weight"].shape == (18, 576)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6
    card = (folder / "README.md").read_text()
    for said in (
        saved["base"],
        "python -m analysis.pretrained.card",
        "## To mind",
        f"{saved['settings']['window']}",
    ):
        assert said in card
    assert f"price {saved['policy']['price']}" in card


def test_another_model_is_refused_and_ones_own_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"model: expected the LlamaForCausalLM .* weights or architecture differ"
    ):
        load_patch(tiny("llama"), "smollm2-135m")
    with pytest.raises(ValueError, match="folder: expected a saved patch"):
        load_patch(tiny("llama"), "smollm2-1350m")
    monkeypatch.chdir(tmp_path)
    assert folder_of("smollm2-135m") == SHIPPED / "smollm2-135m"
    (tmp_path / "smollm2-135m").mkdir()
    assert folder_of("smollm2-135m") == Path("smollm2-135m")


def test_figures_are_of_the_policy_that_was_saved() -> None:
    router: Any = patch(
        tiny("llama"), window=8, sinks=4, experts=("full", "local"), route_by="head"
    )
    texts = {"some": TokenStream(tokens(1, 400)[0], VOCAB, "some")}
    for price, cost in ((-1e3, 1.0), (1e3, share(40, 8, 4))):
        router.policy = Budget(tuple(router.cost_ratio.tolist()), price)
        row = figures(router, texts, 40, 4).iloc[0]
        assert row["pieces"] == 4 and row["cost"] == pytest.approx(cost, abs=1e-3)
        assert (row["lost, %"] == 0) == (price < 0)


def test_a_report_finds_one_by_its_name_and_writes_nothing_into_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = report.parser([]).parse_args(["smollm2-135m", "smollm2-135m-range", "--out", "x"])
    report.begin(options)
    assert (options.run, options.other) == tuple(SHIPPED / name for name in NAMES[:2])
    alone = report.parser([]).parse_args(["smollm2-135m"])
    report.begin(alone)
    assert alone.out == Path("smollm2-135m.html")
