"""`python -m analysis.pretrained.smollm --quick both` from end to end on a tiny model.

Costs of static choices and windows.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.integrations.tiny_models import GROUPED, VOCAB, patched, tokens, transformers

contenders = pytest.importorskip("analysis.pretrained.contenders")


def test_costs_are_keys_read() -> None:
    _, router = patched("llama", window=6, sinks=2, experts=("full", "local"))
    T = 20
    read = [(min(t + 1, 6) + min(max(t + 1 - 6, 0), 2)) / (T * (T + 1) / 2) for t in range(T)]
    assert contenders.share(T, 6, 2) == pytest.approx(sum(read))
    routes = torch.zeros(2, T, dtype=torch.int64)
    assert contenders.executed_cost(router, routes) == pytest.approx(1)
    routes[1] = 1
    assert contenders.executed_cost(router, routes) == pytest.approx((1 + sum(read)) / 2)
    kept, cost = contenders.layers_within(router, T, 0.95)
    assert kept == 1 and cost == pytest.approx((1 + sum(read)) / 2)
    width = contenders.window_of(T, 0.5, 2)
    assert contenders.share(T, width, 2) <= 0.5 < contenders.share(T, width + 1, 2)


@torch.no_grad()
def test_a_wider_window_is_taken_back_and_greedy_begins_with_the_harmless() -> None:
    model, router = patched("llama", window=6, experts=("full", "local"))
    ids = tokens(1, 30)
    original = router.unrouted(ids)
    router.force("local")
    with contenders.windowed(router, 30):
        torch.testing.assert_close(model(ids).logits, original)
    assert not torch.allclose(model(ids).logits, original)
    found = contenders.orders(router, ids, 60.0)
    assert (
        all(sorted(order) == [0, 1] for order in found.values())
        and found["greedy"][0] == found["one by one"][0]
    )


@pytest.mark.slow
def test_the_study_runs_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from analysis.pretrained import smollm as patch_smollm

    torch.manual_seed(0)
    # half of the cost keeps one layer on full
    config = {**GROUPED, "max_position_embeddings": 1024, "num_hidden_layers": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(
        tmp_path / "model"
    )
    random = np.random.default_rng(0)
    texts = ("train", "wikitext103 valid", "wikitext103", "novels")
    ids = {name: random.integers(3, VOCAB, 4000).astype(np.uint16) for name in texts}
    np.savez(tmp_path / "tokens.npz", allow_pickle=False, **ids)
    results = tmp_path / "results.csv"
    paths = [str(tmp_path / name) for name in ("model", "tokens.npz", "patch", "results.csv")]
    arguments = [
        "patch_smollm",
        "--quick",
        "--device",
        "cpu",
        "both",
        *paths,
        "--repeats",
        "1",
        "--window",
        "32",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    patch_smollm.main()
    frame = pd.read_csv(results)
    assert {
        "original",
        "routed",
        "one window",
        "static, greedy",
        "static, the router's own",
    } <= set(frame["contender"])
    half = frame[
        (frame["budget"] == 0.5) & (frame["text"] == "novels") & (frame["context"] == 512)
    ].set_index("contender")
    assert half["cost"].max() <= 0.5 and half["cost"].max() - half["cost"].min() < 0.2
    results.write_text("\n".join(results.read_text().splitlines()[:4]) + "\n")
    capsys.readouterr()
    patch_smollm.main()
    assert "fit on" not in capsys.readouterr().out and len(pd.read_csv(results)) == len(frame)
