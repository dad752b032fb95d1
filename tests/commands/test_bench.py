"""`bayes-router bench` as a user meets it, at toy size."""

from pathlib import Path

import pandas as pd
import pytest

from bayes_router.benchmark import memory, suite
from bayes_router.cli import main


def test_bench_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a process for each reading takes seconds
    monkeypatch.setattr(memory, "measurable", lambda device: False)
    monkeypatch.setattr(suite, "QUICK_BUDGET", 0.0)
    monkeypatch.setattr(suite, "verify", lambda device, until: [])  # tests/analysis/test_speed.py
    arguments = [
        "bench",
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--lengths",
        "64",
        "128",
        "--mixes",
        "20/40/40",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert (
        "forward 20/40/40, runs of 1, B1 H8 Dh64: " in text
        and "decode 20/40/40, runs of 64, B10 H8 Dh64: " in text
    )
    assert (
        "worst auto, " in text
        and "linear alone, H8 Dh64, a doubling from T 64 to 128: time " in text
        and str(tmp_path) in text
    )
    table = pd.read_csv(tmp_path / "speed_cpu.csv")
    assert {"forward", "forward+backward", "decode", "alone"} == set(table["what"])
    assert (
        set(table["T"]) == {64, 128}
        and table["versions"].str.contains("torch").all()
        and table["device"].notna().all()
    )
    routed = table[table["variant"] == "auto"]
    assert (routed["share"] - routed["speedup"] / routed["ideal"]).abs().max() < 1e-3 * routed[
        "share"
    ].max()
    assert (tmp_path / "speed_cpu.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixes", "10/60"], "mixes: expected percentages"),
        (["--lengths", "0"], "lengths: expected at least 1 token; got 0"),
        (["--shapes", "1x2x3"], "shapes: expected BxHxTxDh, as 1x16x32768x64; got '1x2x3'"),
        (["--seconds", "0"], "seconds: expected a positive number; got 0"),
        (["--device", "abacus"], "expected auto, cpu or a device"),
    ],
)
def test_wrong_options_end_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
