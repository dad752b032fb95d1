"""The benchmark of routing units at toy size, and the routes that a patch is timed with."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.speed import patched_model, units
from tests.integrations.tiny_models import patched, tokens


def test_each_unit_is_timed_beside_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "units.csv"
    monkeypatch.setattr(units, "PROBLEMS", [(1, 4, 2, 16, 64, False), (1, 2, 2, 16, 64, True)])
    options = ["--device", "cpu", "--turns", "2", "--results", str(path)]
    monkeypatch.setattr("sys.argv", ["units", *options])
    units.main()
    rows = pd.read_csv(path)
    assert rows["unit"].tolist() == ["full", "layer", "kv_head", "head", "full", "layer", "head"]
    assert (rows.loc[rows["unit"] == "layer", "over layer"] == 1).all()
    monkeypatch.setattr(units, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="these differ: 1 units"):
        units.main()


def test_shares_are_drawn_for_every_unit() -> None:
    choices = units.route(1, 20_000, 3, torch.device("cpu"))
    share = (choices == 0).float().mean((0, 1))
    assert ((share - 0.1).abs() < 0.01).all() and not torch.equal(choices[..., 0], choices[..., 1])


@torch.no_grad()
def test_a_pass_executes_the_routes_that_were_kept(tmp_path: Path) -> None:
    model, router = patched("llama", experts=("full", "local"), route_by="head")
    ids = tokens(1, 21)
    own = model(ids).logits
    on_full = torch.rand(2, 21, 4) < 0.3
    patched_model.write_routes(tmp_path / "routes.npz", on_full)
    kept = patched_model.read_routes(tmp_path / "routes.npz")
    assert torch.equal(kept, on_full)
    with patched_model.executing(router, kept):
        found = model(ids).logits
    assert torch.equal(model(ids).logits, own)
    router.force((~on_full).long()[:, None])
    assert torch.equal(model(ids).logits, found) and not torch.equal(found, own)
