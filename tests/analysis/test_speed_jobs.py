"""The benchmark's lengths, divided among processes."""

import sys
from pathlib import Path

import pytest
import torch

from analysis.speed.kernels import divided

BENCH = """
import sys
from pathlib import Path
out, at = Path(sys.argv[sys.argv.index("--out") + 1]), sys.argv.index("--lengths")
if "7" in sys.argv[at:]:
    sys.exit(3)
out.mkdir(parents=True)
rows = [f"{T},{kind},{out.name},{sys.argv[1]}" for T in sys.argv[at + 1 :] for kind in "ab"]
(out / "speed_cpu.csv").write_text("T,variant,job,said,command\\n" + ",x\\n".join([*rows, ""]))
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


def test_every_length_is_read_once_and_stands_in_the_order_asked_for(program: list[str]) -> None:
    name, table = divided(2, ["512", "8192", "64"], ["--quick"], program)
    assert name == "speed_cpu.csv"
    assert table["T"].tolist() == [512, 512, 8192, 8192, 64, 64]
    assert table["variant"].tolist() == ["a", "b"] * 3
    assert table["job"].tolist() == [0, 0, 1, 1, 0, 0]
    assert set(table["said"]) == {"--quick"} and "x" not in set(table["command"])


def test_nothing_is_reported_where_a_job_fails_or_has_no_length(program: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"these jobs failed: \[1\]"):
        divided(2, ["512", "7"], [], program)
    with pytest.raises(SystemExit, match="expected 1 to 1, for 1 --lengths and 2 cards; got 2"):
        divided(2, ["512"], [], program)


def test_no_two_jobs_are_timed_on_one_card(
    program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = ["512", "64", "128"]
    with pytest.raises(SystemExit, match="expected 1 to 2, for 3 --lengths and 2 cards; got 3"):
        divided(3, lengths, [], program)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # nor on the cores of a CPU
    with pytest.raises(SystemExit, match="expected 1 to 1, for 3 --lengths and 0 cards; got 2"):
        divided(2, lengths, [], program)
    assert len(divided(1, lengths, [], program)[1]) == 6
