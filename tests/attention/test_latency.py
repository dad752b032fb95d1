"""Measured latencies: read once, kept under the name of the device that they were read on."""

import json
import platform
from pathlib import Path

import pytest
import torch

from bayes_router import timing
from bayes_router.attention import latency
from bayes_router.attention.cost import cost_ratios
from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.shapes import ExpertShape
from bayes_router.types import CostModel

CPU = torch.device("cpu")


def experts() -> list[Expert]:
    return [
        expert_class(name)(ExpertShape(num_heads=2, head_dim=8, window=5))
        for name in ("full", "linear", "local")
    ]


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(timing, "CPUINFO", path)
    return path


def test_latency_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cost_ratios(experts(), CostModel.LATENCY, 64, device="cpu")
    assert first[0] > 0 and (first > 0).all()
    monkeypatch.setattr(latency, "_measure", lambda *_: pytest.fail("measured again"))
    torch.testing.assert_close(cost_ratios(experts(), CostModel.LATENCY, 64, device="cpu"), first)
    assert all(
        key.startswith(f"{timing.device_name(CPU)} | 2.")
        for key in json.loads(latency.cache_path().read_text())
    )


def test_a_damaged_cache_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    latency.cache_path().parent.mkdir(parents=True)
    latency.cache_path().write_text("{not json")
    assert (cost_ratios(experts(), CostModel.LATENCY, 32, device="cpu") > 0).all()


def test_a_processor_has_its_name(cpuinfo: Path) -> None:
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Some CPU: 3.0 GHz\nflags\t: fpu\n\nprocessor\t: "
        "1\nmodel "
        "name\t: other\n"
    )
    assert timing.device_name(CPU) == f"Some CPU: 3.0 GHz, {torch.get_num_threads()} threads"


@pytest.mark.parametrize("content", [None, "", "CPU implementer\t: 0x41\n", "model name\t:  \n"])
def test_a_processor_without_a_name_there(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    if content is not None:
        cpuinfo.write_text(content)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert timing.device_name(CPU).startswith("arm, ")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert timing.device_name(CPU).startswith("aarch64, ")


def test_another_processor_is_measured_anew(
    cpuinfo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "_measure", lambda *_: [1.0, 2.0, 3.0])
    cpuinfo.write_text("model name\t: A\n")
    assert latency.measured_latencies(experts(), 8, CPU) == [1.0, 2.0, 3.0]
    monkeypatch.setattr(latency, "_measure", lambda *_: [4.0, 5.0, 6.0])
    assert latency.measured_latencies(experts(), 8, CPU) == [1.0, 2.0, 3.0]
    cpuinfo.write_text("model name\t: B\n")
    assert latency.measured_latencies(experts(), 8, CPU) == [4.0, 5.0, 6.0]
