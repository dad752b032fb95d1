"""The benchmark of a busy neighbour, at toy size."""

from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from analysis.speed import neighbour


def test_each_contender_is_read_alone_and_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = tmp_path / "rows.csv", torch.get_num_threads()
    options = ["--keys", "1100", "--turns", "3", "--seconds", "0", "--results", str(path)]
    monkeypatch.setattr("sys.argv", ["neighbour", *options])
    neighbour.main()
    torch.set_num_threads(before)
    rows = pd.read_csv(path)
    assert rows["busy"].tolist() == [0] * 5 + [1] * 5
    assert (rows["least"] <= rows["ms"]).all() and (rows["ms"] <= rows["most"]).all()
    assert (rows.loc[rows["contender"] == "full", "over full"] == 1).all()


def test_neighbours_are_there_in_their_block_and_gone_after_it() -> None:
    me = psutil.Process()
    before = set(me.children())
    with pytest.raises(KeyError), neighbour.neighbours(2):
        there = set(me.children()) - before
        assert len(there) == 2 and all(one.is_running() for one in there)
        raise KeyError
    assert not any(one.is_running() for one in there)
