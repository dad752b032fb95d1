"""The clock of a patched model on a GPU, here with what stands in for its graphs on a CPU."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
from analysis.speed import patched, patched_decode, patched_model  # noqa: E402
from tests.integrations.graphs_anywhere import install  # noqa: E402

LENGTHS = (96, 160)


def test_every_contender_has_its_rows_against_what_can_do_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(patched_decode, "replayed", lambda call: call)
    monkeypatch.setattr(patched_decode, "LENGTHS", {1: LENGTHS, 2: LENGTHS[:1]})
    monkeypatch.setattr(patched, "SOME", LENGTHS[1:])
    monkeypatch.setattr(patched, "disagreements", lambda *args: [])
    monkeypatch.setattr(patched, "whole", lambda model: model)
    for place in (patched, patched_model):
        monkeypatch.setattr(place, "SHAPES", {"tiny": (32, 48, 2, 4, 2)})
    monkeypatch.setattr(patched_model, "WINDOW", 16)
    options = "--device cpu --shapes tiny --turns 1 --units layer head --batches 1 2 --compiled 160"
    options += f" --lengths 96 160 --results {path} --routes {tmp_path / 'none'}"
    monkeypatch.setattr("sys.argv", ["patched", *options.split()])
    torch.manual_seed(0)
    patched.main()
    rows = pd.read_csv(path)
    found: Any = rows.groupby(["what", "unit", "context", "batch"])["contender"].agg(set)
    assert len(found["prefill", "layer", 160, 1]) == 3 * 5 + 1 + 1  # flash, and the setting
    assert found["prefill", "head", 160, 1] >= {"routed 0.1, graph", "routed 0.1, graphs=True"}
    assert ("prefill", "head", 96, 1) not in found.index
    steps = {"floor: flash, graph", "routed 0.1, static cache, graphs=True"}
    assert found["decode", "head", 96, 2] >= steps and found["decode", "layer", 160, 1] >= steps
    assert not rows["best"].str.startswith("floor").any()
    shares = rows[rows["contender"].isin(["routed 0.3", "routed 0.3, graph"])]["on_full"]
    assert shares.between(0.25, 0.35).all()
    monkeypatch.setattr("sys.argv", ["patched", *options.split(), "--seconds", "0"])
    patched.main()
    assert len(pd.read_csv(path)) == len(rows)  # nothing was read, and no table replaced
