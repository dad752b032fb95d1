"""The benchmark on a CUDA device, in seconds: `python -m pytest -m gpu tests/gpu/test_bench.py`."""

import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.speed import speed_model
from bayes_router.attention.hard.backend import Backend
from bayes_router.attention.hard.dense import DENSE
from bayes_router.attention.hard.rows import TORCH
from bayes_router.attention.hard.short import SHORT
from bayes_router.attention.hard.sorted import TRITON
from bayes_router.benchmark import model, verify
from bayes_router.benchmark.plan import BenchmarkPlan
from bayes_router.benchmark.suite import run_benchmark
from bayes_router.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def test_every_backend_is_verified_in_seconds() -> None:
    assert {TRITON, SHORT, DENSE, TORCH} <= set(verify.verify(CUDA))  # compiles
    start = time.perf_counter()
    verify.verify(CUDA)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("experts", [("full", "gated", "local"), ("full", "linear"), ("local",)])
def test_the_experts_of_a_model_are_verified(experts: tuple[str, ...]) -> None:
    assert TRITON in verify.verify(CUDA, experts)


def test_a_kernel_that_is_wrong_in_split_rows_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = verify.routed_attention

    def wrong(
        q: torch.Tensor, *inputs: object, backend: Backend | str, **options: object
    ) -> torch.Tensor:
        out = right(q, *inputs, backend=backend, **options)  # type: ignore[arg-type]
        return out * 1.1 if backend is TRITON and q.shape[2] > 4000 else out

    monkeypatch.setattr(verify, "routed_attention", wrong)
    with pytest.raises(ValueError, match="triton on cuda: out is off by"):
        verify.verify(CUDA)


def test_bench_measures_one_shape_every_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "bench",
                "--device",
                "cuda",
                "--shapes",
                "2x4x4000x64",
                "--mixes",
                "10/60/30",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    table = pd.read_csv(tmp_path / "speed_cuda.csv")
    assert {"forward", "forward+backward", "decode", "alone", "training memory"} == set(
        table["what"]
    )
    lead = table[table["what"].eq("forward") & table["run"].eq(1)]
    assert {"auto", "triton", "short", "graph auto"} <= set(lead["variant"]) and lead["ms"].gt(
        0
    ).all()
    assert table.loc[table["variant"].eq("auto"), "peak_mib"].gt(0).all()
    text = capsys.readouterr().out
    assert (
        "worst auto, busy stream" in text and "training memory 10/60/30, B1 H4 T4000 Dh64: " in text
    )
    assert (tmp_path / "speed_cuda.png").stat().st_size > 1000


def test_targets_come_first_and_time_is_kept(tmp_path: Path) -> None:
    verify.verify(CUDA)  # compiles, which may take longer than the benchmark is given
    start = time.perf_counter()
    table = run_benchmark(CUDA, BenchmarkPlan(seconds=40), tmp_path)
    # a group that has begun is finished, and kernels are compiled
    assert time.perf_counter() - start < 70
    assert table.iloc[0]["T"] == 32768 and table.attrs["left_out"]


def test_a_model_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "SECONDS", 0.0)
    argv = [
        "speed_model.py",
        "tiny",
        "--device",
        "cuda",
        "--lengths",
        "512",
        "4096",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    speed_model.main()
    table = pd.read_csv(tmp_path / "speed_model_cuda.csv")
    routed = table[table["variant"].eq("routed")]
    assert (
        set(routed["B"]) == {1, 16}
        and routed["cost_flops"].gt(0).all()
        and routed["model_mbytes"].gt(0).all()
    )
    assert {"graph routed", "graph full"} <= set(table.loc[table["what"].eq("decode"), "variant"])
    assert "prefill routed, batch 1, 512 tokens: " in capsys.readouterr().out
