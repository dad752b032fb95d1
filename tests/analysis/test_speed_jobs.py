"""The benchmark, divided among processes."""

import sys
from pathlib import Path

import pytest
import torch

from analysis.speed.kernels import divided

BENCH = """
import sys
from pathlib import Path
out, part = (sys.argv[sys.argv.index(name) + 1] for name in ("--out", "--part"))
if "fail" in sys.argv and part.startswith("2/"):
    sys.exit(3)
Path(out).mkdir(parents=True)
rows = [f"{T},{part},{sys.argv[1]}" for T in (512, 64 * int(part[0]))]
Path(out, "speed_cpu.csv").write_text("T,part,said,command\\n" + ",x\\n".join([*rows, ""]))
"""


@pytest.fixture(autouse=True)
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """A benchmark that says what it was asked for."""
    path = tmp_path / "bench.py"
    path.write_text(BENCH)
    return [sys.executable, str(path)]


def test_every_part_is_read_once_and_the_shortest_texts_come_first(program: list[str]) -> None:
    name, table = divided(2, ["--quick"], program)
    assert name == "speed_cpu.csv"
    assert table["T"].tolist() == [64, 128, 512, 512]
    assert table["part"].tolist() == ["1/2", "2/2", "1/2", "2/2"]
    assert set(table["said"]) == {"--quick"} and "x" not in set(table["command"])


def test_nothing_is_reported_where_a_job_fails(program: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"these jobs failed: \[1\]"):
        divided(2, ["fail"], program)


def test_no_two_jobs_are_timed_on_one_card(
    program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="expected 1 to 2, for 2 cards; got 3"):
        divided(3, ["--quick"], program)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # nor on the cores of a CPU
    with pytest.raises(SystemExit, match="expected 1 to 1, for 0 cards; got 2"):
        divided(2, ["--quick"], program)
    assert divided(1, ["--quick"], program)[1]["part"].tolist() == ["1/1", "1/1"]
