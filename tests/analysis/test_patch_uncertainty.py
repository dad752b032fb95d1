"""The uncertainty of a patch, read from end to end on a tiny model."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import posterior
from analysis.pretrained import authors, uncertain_passes, uncertainty
from bayes_router.routing.policy import Budget
from tests.integrations.tiny_models import VOCAB, patched


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, its patch, and texts of which the own ones have low ids."""
    root = tmp_path_factory.mktemp("patch")
    model, router = patched("llama", window=6, sinks=2, experts=("full", "local"), route_by="head")
    router.policy = Budget(tuple(router.cost_ratio.tolist()), 0.1)
    router.save(root / "router")
    router.unpatch()
    model.save_pretrained(root / "model")
    random = np.random.default_rng(0)
    ids = {name: random.integers(3, 20, 3000).astype(np.uint16)
           for name in ("fit novels", "own novels", "read novels")}  # fmt: skip
    for name in ("read wikitext", "read python", "other German"):
        ids[name] = random.integers(40, VOCAB, 3000).astype(np.uint16)
    ids["author novels"] = np.repeat(np.arange(6, dtype=np.uint16), 500)
    np.savez(root / "tokens.npz", **ids)  # type: ignore[arg-type]
    return root / "model", root / "router", root / "tokens.npz"


def run(monkeypatch: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["posterior", *map(str, arguments)])
    posterior.main()


@pytest.mark.slow  # passes, and the intervals of six tables
def test_a_patch_is_read_and_its_tables_are_made_again(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    model, patch, tokens = folders
    monkeypatch.setattr(uncertainty, "RESPLITS", 5)
    monkeypatch.setattr(uncertainty, "TOLERANCES", (1e-5,))
    monkeypatch.setattr(uncertain_passes, "PRICES", (-40.0, 0.0, 0.1, 40.0))
    sizes = {
        "context": 48, "windows": 8, "calibration": 10, "batch": 10, "tokens": 1000, "forced": 2,
        "units": 4, "prompt": 24, "decoded": 6, "rows": 3, "steps": 5,
    }  # fmt: skip
    plan = [x for name, value in sizes.items() for x in (f"--patch-{name}", value)]
    run(monkeypatch, patch, "--model", model, "--token-file", tokens, "--out", tmp_path,
        "--draws", 4, *plan)  # fmt: skip
    tables = {name: pd.read_csv(tmp_path / f"patch_{name}.csv") for name in uncertainty.TABLES}
    told = tables["evidence"].set_index(["text", "score"])["auroc"]
    assert told["python", "recent"] > 0.9 > 0.6 > told["novels by others", "recent"]
    assert 0.4 < told["an author, unknown", "recent"] < 0.6  # ids of one distribution
    kept = tables["quality"].query("`read on` == 'own'")
    assert sorted(kept["windows"].unique()) == [10, 20, 40, 80, 160]
    assert ((kept["kept low"] <= kept["kept"]) & (kept["kept"] <= kept["kept high"])).all()
    decoded = tables["decoding"]
    assert (decoded["as one pass"] == 1).all()
    np.testing.assert_allclose(decoded["lost"], decoded["lost in one pass"], atol=1e-5)
    guarded = tables["guard"].set_index(["promise", "text", "policy"])
    assert guarded.loc[(0.01, "python", "guard"), "cost"] > 0.9
    assert guarded.loc[(0.01, "python", "guard"), "lost"] == pytest.approx(0, abs=2e-3)
    before = (tmp_path / "patch_guard.csv").read_text()
    run(monkeypatch, patch, "--readings", tmp_path / "readings.npz", "--out", tmp_path / "again",
        "--draws", 4)  # fmt: skip
    assert (tmp_path / "again" / "patch_guard.csv").read_text() == before


def test_each_author_is_left_out_once_and_a_planted_stranger_is_told() -> None:
    """Of 7 authors the last is far from whoever does not know him, and near where he is known."""
    random, stranger = np.random.default_rng(0), 6
    scores = random.normal(size=(authors.FOLDS, 7, 400))
    scores[stranger % authors.FOLDS, stranger] += 3
    unknown, known = authors.told_apart(scores)
    assert unknown[stranger] > 0.95 and np.abs(unknown[:stranger] - 0.5).max() < 0.1
    assert np.abs(known - 0.5).max() < 0.05
    rows = authors.author_rows({name: scores for name in authors.SCORES}, 50)
    told = pd.DataFrame(rows).set_index(["text", "score"])["value"]
    assert told["an author, unknown", "recent"] == pytest.approx(unknown.mean())
    assert told["sd of unknown authors", "token"] > 4 * told["sd of known authors", "token"]


def test_no_author_is_read_on_what_was_fitted_on() -> None:
    author = torch.arange(3).repeat_interleave(100)
    ids = torch.arange(300)
    fitted, read = authors.halves(ids, author, 10)
    assert read.shape == (3, authors.EACH, 10)
    for one in range(3):
        assert (author[fitted[one]] == one).all() and (author[read[one].flatten()] == one).all()
        assert not set(fitted[one].tolist()) & set(read[one].flatten().tolist())
    with pytest.raises(ValueError, match="author novels: expected 160 tokens each; got 100"):
        authors.halves(ids, author, 40)


def test_a_step_over_a_cut_cache_loses_what_a_forced_pass_loses(
    folders: tuple[Path, Path, Path],
) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache

    from analysis.pretrained.uncertain_passes import step_logits
    from bayes_router import load_patch
    from bayes_router.diagnostics.measures.regret import forced_logits, losses_of
    from bayes_router.types import RoutingMode

    router = load_patch(AutoModelForCausalLM.from_pretrained(folders[0]).eval(), folders[1])
    ids = torch.randint(3, VOCAB, (41,), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    with torch.no_grad():
        out = router(ids[None, :40], RoutingMode.HARD, past_key_values=cache, use_cache=True)
        t, pairs, R = 30, [(0, 1), (1, 3)], out.route.shape[3]
        stepped = step_logits(router, cache, ids, t, out.route[:, :, t], pairs)
        whole = forced_logits(
            router, ids[: t + 1], out.route, [(layer * R + u, t) for layer, u in pairs]
        )
    found, whole = (losses_of(x, ids[t + 1].expand(2)) for x in (stepped, whole))
    torch.testing.assert_close(found, whole.to(found), rtol=0, atol=1e-5)
    assert (found[:, 0] - found[:, 1]).abs().min() > 1e-6
