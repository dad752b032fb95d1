"""The benchmark behind `python -m analysis.speed`: what it refuses, how it compares, where it says that routing loses."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from bayes_router.attention.dispatch import Backend
from bayes_router.benchmark import cases, clock, suite, verify
from bayes_router.benchmark.clock import Clock, Timing
from bayes_router.benchmark.suite import Plan, break_even, compared, run_benchmark

CPU = torch.device("cpu")


def test_nothing_is_reported_while_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = verify.routed_attention

    def wrong(*inputs: object, backend: Backend | str, **options: object) -> torch.Tensor:
        out = right(*inputs, backend=backend, **options)  # type: ignore[arg-type]
        return out * 1.01 if backend is Backend.TORCH else out

    monkeypatch.setattr(verify, "routed_attention", wrong)
    with pytest.raises(ValueError, match="torch on cpu: out is off by 1.0e-02; no speed-up is reported"):
        run_benchmark(CPU, Plan(quick=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_backend_of_this_device_is_verified() -> None:
    assert verify.verify(CPU) == [Backend.TORCH, Backend.DENSE]


def test_calls_take_turns_and_medians_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = Clock(CPU, budget=100.0)({name: lambda name=name: order.append(name) for name in "ab"})  # type: ignore[misc]
    assert order == ["a", "b"] * (1 + clock.MOST)
    assert all(timing.ms == timing.wall_ms > 0 for timing in times.values())


def test_graphs_are_compared_with_graphs() -> None:
    names = ("full cudnn", "full flash", "auto", "graph full cudnn", "graph auto")
    times = dict(zip(names, (Timing(2, 8), Timing(4, 4), Timing(1, 8), Timing(2, 6), Timing(4, 3)), strict=True))
    rows = {row["variant"]: row for row in compared(times, {"auto": 7.0}, ideal=4.0)}
    assert (rows["auto"]["speedup"], rows["auto"]["wall_speedup"], rows["auto"]["share"]) == (2.0, 0.5, 0.5)
    assert (rows["graph auto"]["speedup"], rows["graph auto"]["wall_speedup"]) == (0.5, 2.0)
    assert rows["full flash"]["share"] is None and rows["auto"]["peak_mib"] == 7.0


def test_the_losing_region_is_said() -> None:
    facts = {"what": "forward", "variant": "auto", "run": 1}
    rows = [{**facts, "mix": "a", "T": T, "speedup": s} for T, s in ((512, 0.5), (1024, 1.1), (2048, 0.9), (4096, 2.0))]
    rows += [{**facts, "mix": "b", "T": 512, "speedup": 0.2}, {**facts, "mix": "c", "T": 512, "speedup": 1.2}]
    assert break_even(pd.DataFrame(rows)) == [
        "forward a: ahead from 4096 tokens; loses up to 2048 (0.50x at 512)",
        "forward b: ahead nowhere; loses up to 512 (0.20x at 512)",
        "forward c: ahead of full attention at every length measured",
    ]


@pytest.mark.parametrize("mix", ["10/60", "10/60/40", "a/b/c", "-10/60/50"])
def test_a_mix_that_is_none_is_refused(mix: str) -> None:
    with pytest.raises(ValueError, match="mixes: expected percentages FULL/LINEAR/LOCAL that add up to 100"):
        Plan(mixes=(mix,))


def test_routes_follow_the_mix() -> None:
    torch.manual_seed(0)
    route = cases.draw_route("10/60/30", 4, 5000, run=50)
    assert (route.view(4, -1, 50) == route.view(4, -1, 50)[:, :, :1]).all()
    share = torch.bincount(route.flatten(), minlength=3) / route.numel()
    torch.testing.assert_close(share, torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=0.1)


def test_a_missing_package_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "seaborn", None)
    with pytest.raises(ValueError, match="expected the packages pandas and seaborn; got: .* run: pip install seaborn"):
        suite.drawing_packages()
