"""Where it is faster to sort nothing: the command, with the reference for both kinds of kernels."""

import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from analysis.speed import unsorted
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.hard.reference import REFERENCE


def slow(problem: RoutedProblem) -> Tensor:
    time.sleep(0.005)
    return REFERENCE.attend(problem)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two kinds of one size, whose unsorted kernels are the slower ones."""
    for name, call in (("unsorted", slow), ("sorting", REFERENCE.attend)):
        monkeypatch.setattr(unsorted, name, call)
    kinds = [kind._replace(sizes=((1, 4, 40),)) for kind in unsorted.KINDS[:2]]
    monkeypatch.setattr(unsorted, "KINDS", [kind._replace(dtype=torch.float32) for kind in kinds])
    path = tmp_path / "found.csv"
    options = ["--device", "cpu", "--seconds", "0.1", "--results", str(path)]
    monkeypatch.setattr(sys, "argv", ["unsorted.py", *options])
    return path


def test_both_ways_are_read_and_what_is_taken_is_told(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsorted.main()
    table = pd.read_csv(small)
    assert table["gradients"].tolist() == [False, True] * 2 and table["kind"].nunique() == 2
    assert (table["ratio"] > 1).all() and (table["error"] < 1e-5).all()
    # of float32 what has gradients alone, which is slower here
    assert table["taken"].tolist() == [False, True] * 2
    assert "2 of 4 take the slower of both" in capsys.readouterr().out


def test_nothing_is_reported_of_what_is_wrong(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: RoutedProblem) -> Tensor:
        out = REFERENCE.attend(problem)
        return out + 0.1 * problem.v.repeat(1, out.shape[1] // problem.v.shape[1], 1, 1)

    monkeypatch.setattr(unsorted, "unsorted", wrong)
    with pytest.raises(SystemExit, match="the same queries and keys for all: relative error"):
        unsorted.main()
    assert not small.exists()


def test_the_kinds_are_what_they_are_called() -> None:
    kinds = {
        kind.name: unsorted.draw(kind, *unsorted.COMPARED, torch.device("cpu"))
        for kind in unsorted.KINDS
    }
    one, apart = kinds["the same queries and keys for all"], kinds["queries and keys by expert"]
    assert one.plain_q is one.q and one.plain_k is one.k and apart.plain_q is not apart.q
    assert kinds["routes by head"].units == 4 and kinds["four heads share keys"].k.shape[1] == 1
    assert (
        kinds["4 sinks"].experts[2].shape.sinks == 4 and len(kinds["full and local"].experts) == 2
    )
    assert kinds["heads of 32"].q.shape[3] == 32 and kinds["heads of 128"].q.shape[3] == 128
    assert kinds["float16"].q.dtype == torch.float16 and kinds["float32"].q.dtype == torch.float32
