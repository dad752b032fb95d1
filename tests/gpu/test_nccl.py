"""Two GPUs are one run: NCCL between them, the same losses as one."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from bayes_router.config import Config, with_changes
from bayes_router.training.checkpoint import load_run
from bayes_router.training.fit import fit
from tests.tiny import fit_config
from tests.training.test_distributed import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


COLUMNS = ["step", "nll", "kl", "valid_nll_hard"]


def settings(text: Path) -> Config:
    text.write_text("\n\n".join(f"{n} squared is {n * n}, and cubed {n**3}." for n in range(3000)))
    config = fit_config(str(text), steps=40, draws="row", lr=1e-2, device="cuda", eval_every=10)
    return with_changes(config, {"schedule.anneal_from": 0.0, "schedule.anneal_to": 0.5})


def fit_on_two(config: Config, out: Path) -> str:
    """What a fit by torchrun prints."""
    file = out.with_suffix(".toml")
    file.write_text(config.to_toml())
    return torchrun("-m", "bayes_router", "fit", "--config", file, "--out", out).stdout


def losses(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "metrics.csv")[COLUMNS]


def test_two_gpus_have_the_losses_of_one(tmp_path: Path) -> None:
    config = settings(tmp_path / "text.txt")
    fit_on_two(config, tmp_path / "two")
    fit(config, tmp_path / "one", progress=False)
    # float32, summed in another order, over 40 steps
    pd.testing.assert_frame_equal(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3)


def test_cut_over_two_gpus_it_has_the_losses_of_copies(tmp_path: Path) -> None:
    """FSDP2: also half of the memory, printed, and a folder that one process opens."""
    config = settings(tmp_path / "text.txt")
    cut = with_changes(config, {"train.shard": True})
    fit_on_two(config, tmp_path / "copies")
    printed = fit_on_two(cut, tmp_path / "cut")
    pd.testing.assert_frame_equal(losses(tmp_path / "cut"), losses(tmp_path / "copies"), rtol=1e-3)
    held = [
        json.loads((tmp_path / run / "summary.json").read_text())["held_bytes_per_rank"]
        for run in ("copies", "cut")
    ]
    assert all(0.45 * c < p < 0.6 * c for c, p in zip(*held, strict=True))
    assert all(f"rank {rank} holds" in printed for rank in (0, 1))
    copies, parts = (load_run(tmp_path / run)[1].state_dict() for run in ("copies", "cut"))
    for name, weight in copies.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-2, atol=1e-3)
