"""Two GPUs are one run: NCCL between them, the same losses as one."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from bayes_router.config import with_changes
from bayes_router.training.fit import fit
from tests.tiny import fit_config
from tests.training.test_distributed import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_two_gpus_have_the_losses_of_one(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} squared is {n * n}, and cubed {n**3}." for n in range(3000)))
    config = fit_config(str(text), steps=40, draws="row", lr=1e-2, device="cuda", eval_every=10)
    config = with_changes(config, {"schedule.anneal_from": 0.0, "schedule.anneal_to": 0.5})
    (tmp_path / "settings.toml").write_text(config.to_toml())
    torchrun(
        "-m",
        "bayes_router",
        "fit",
        "--config",
        tmp_path / "settings.toml",
        "--out",
        tmp_path / "two",
    )
    fit(config, tmp_path / "one", progress=False)
    columns = ["step", "nll", "kl", "valid_nll_hard"]
    two, one = (pd.read_csv(tmp_path / name / "metrics.csv")[columns] for name in ("two", "one"))
    # float32, summed in another order, over 40 steps
    pd.testing.assert_frame_equal(two, one, rtol=1e-3)
