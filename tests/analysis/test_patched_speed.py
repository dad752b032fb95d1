"""The clock of a patched model on a GPU, here with what stands in for its graphs on a CPU."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
from analysis.speed import (  # noqa: E402
    patched,
    patched_decode,
    patched_jobs,
    patched_model,
    patched_prefill,
)
from analysis.speed.patched_check import chosen_clearly  # noqa: E402
from tests.integrations.graphs_anywhere import install  # noqa: E402

LENGTHS = (96, 160)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Set the command line of a tiny run; where its table goes."""
    install(monkeypatch)
    path = tmp_path / "rows.csv"
    for place in (patched_decode, patched_prefill):
        monkeypatch.setattr(place, "replayed", lambda call, back=None: call)
        monkeypatch.setattr(place, "whole", lambda model: model)
    monkeypatch.setattr(patched, "LENGTHS", {1: LENGTHS, 2: LENGTHS[:1]})
    monkeypatch.setattr(patched, "SOME", LENGTHS[1:])
    monkeypatch.setattr(patched, "disagreements", lambda *args: [])
    for name in (patched, patched_prefill, patched_model):
        monkeypatch.setattr(name, "SHAPES", {"tiny": (32, 48, 2, 4, 2)})
    monkeypatch.setattr(patched_model, "WINDOW", 16)
    usual = "--device cpu --shapes tiny --turns 1 --units layer head --batches 1 2 --compiled 160"
    usual += f" --lengths 96 160 --results {path} --routes {tmp_path / 'none'}"

    def given(*more: str) -> Path:
        monkeypatch.setattr("sys.argv", ["patched", *usual.split(), *more])
        torch.manual_seed(0)
        return path

    return given


def test_every_contender_has_its_rows_against_what_can_do_the_same(
    options: Callable[..., Path],
) -> None:
    path = options()
    patched.main()
    rows = pd.read_csv(path)
    found: Any = rows.groupby(["what", "unit", "context", "batch"])["contender"].agg(set)
    assert len(found["prefill", "layer", 160, 1]) == 2 + 1 + 4 + 2  # flash, shares, as shipped
    assert found["prefill", "head", 160, 1] >= {"routed 0.1", "routed 0.1, graph"}
    assert found["compiled", "head", 160, 1] >= {"routed 0.1, compiled, graph"}
    assert found["setting", "layer", 160, 1] >= {"routed 0.1, graphs=True"}
    assert ("prefill", "head", 96, 1) not in found.index
    assert found["called", "layer", 96, 1] == {"unpatched", "as shipped"}
    assert (rows["low"] <= rows["ratio"]).all() and (rows["ratio"] <= rows["high"]).all()
    steps = {"floor: flash, graph", "routed 0.1, static cache, graphs=True"}
    assert found["decode", "head", 96, 2] >= steps and found["decode", "layer", 160, 1] >= steps
    both = {f"{name}, compiled, static cache, graph" for name in ("unpatched", "routed 0.1")}
    assert found["decode", "head", 96, 2] >= both
    assert not found["decode", "head", 96, 1] & both and not found["decode", "layer", 96, 2] & both
    assert not rows["best"].str.startswith("floor").any()
    shares = rows[rows["contender"].isin(["routed 0.3", "routed 0.3, graph"])]["on_full"]
    assert shares.between(0.25, 0.35).all()
    options("--seconds", "0")
    patched.main()
    assert len(pd.read_csv(path)) == len(rows)  # nothing was read, and no table replaced


def test_the_bound_of_a_step_counts_each_key_head_that_is_read_once(
    options: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 texts, 4 query heads on 2 key heads, Dh 8: K and V of two bytes, window and sinks 20."""
    monkeypatch.setattr(patched_decode, "WINDOW", 16)
    route = torch.tensor([[[1, 0, 1, 1]], [[1, 1, 1, 1]]])  # one key head of four on full
    router: Any = SimpleNamespace(
        found=[SimpleNamespace(shape=SimpleNamespace(head_dim=8), kv_heads=2)],
        last=SimpleNamespace(executed={0: route, 1: torch.tensor([[[0]], [[1]]])}),
    )
    keys = (101 + 3 * 20) + (2 * 101 + 2 * 20)
    assert patched_decode.bytes_read(router, 5000, 100) == 5000 + keys * 2 * 8 * 2
    monkeypatch.setattr(patched_decode, "memory_rate", lambda device: 1e9)
    path = options("--what", "decode", "--batches", "2")
    patched.main()
    rows = pd.read_csv(path)
    bound = rows[rows["contender"] == "bound: bytes at 1 GB/s"]
    assert len(bound) == 2 and (bound["ms"] > 0).all()
    for _, row in bound.iterrows():
        same = rows[(rows["unit"] == row["unit"]) & (rows["contender"] == row["best"])]
        assert row["ratio"] == pytest.approx(row["ms"] / same["ms"].iloc[0], rel=1e-3)


def test_jobs_divide_the_groups(
    options: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group is read once, on one card, and stands where one process would have put it."""
    few = "--what", "prefill", "decode", "--batches", "2"
    path = options(*few)
    patched.main()
    alone, group = pd.read_csv(path), ["what", "unit", "context", "batch"]
    path.unlink()
    options(*few, "--jobs", "2")
    patched.main()
    rows = pd.read_csv(path)
    assert set(rows["card"]) == {0, 1} and set(alone["card"]) == {0}
    assert (rows.groupby(group)["card"].nunique() == 1).all()
    assert rows[[*group, "contender"]].equals(alone[[*group, "contender"]])


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_nothing_is_reported_where_a_unit_differs(
    jobs: str, options: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds it, and though others have read their rows."""
    path = options("--jobs", jobs, "--what", "prefill")
    wrong = [lambda device, units: ["head, pass"] if "head" in units else [],
             lambda device, units: os._exit(3)]  # fmt: skip
    for differs in wrong[: int(jobs)]:
        monkeypatch.setattr(patched, "disagreements", differs)
        with pytest.raises(SystemExit, match="nothing is reported"):
            patched.main()
        assert not path.exists()


def test_a_group_that_fails_is_left_out(
    options: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setitem(patched.READ, "decode", broken)
    path = options("--jobs", "2")
    patched.main()
    assert set(pd.read_csv(path)["what"]) <= {"prefill", "compiled", "setting", "called"}
    assert "left out: RowGroup(what='decode'" in capsys.readouterr().out


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_was_read_is_written_where_it_is_ended_from_outside(
    jobs: str,
    options: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`timeout` says so to all processes, and the table needs but the first."""
    program = os.getpid()

    def ended(*args: Any) -> None:
        os.kill(program, signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setitem(patched.READ, "decode", ended)
    path = options("--jobs", jobs, "--what", "called", "decode")
    monkeypatch.setattr(patched, "worth", lambda group, args: group.what == "decode")
    patched.main()
    said = capsys.readouterr().out
    assert "stopped from outside" in said and "left out: RowGroup(what='decode'" in said
    assert jobs == "2" or set(pd.read_csv(path)["what"]) == {"called"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("slow", ["start", "kill"])
def test_no_job_is_left_behind_where_all_are_ended_from_outside(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job tells the program to stop: while others start, and while they are stopped."""
    program, fork = os.getpid(), multiprocessing.context.ForkProcess
    usual = getattr(fork, slow)

    def slowly(job: Any) -> None:
        usual(job)
        time.sleep(0.4)

    def ended(mine: Any) -> None:
        time.sleep(0.2 if slow == "start" else 0.5 + 0.2 * mine.number)
        os.kill(program, signal.SIGTERM)
        time.sleep(20)

    monkeypatch.setattr(fork, slow, slowly)
    with patched_jobs.stoppable():
        patched_jobs.run(tmp_path, 3, ended)
        pytest.fail("it was told to stop")
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_check_counts_no_choice_that_hangs_on_rounding() -> None:
    """A word that stands at the cut of a share again scores the same: float32 decides there."""
    first = torch.tensor([0.5, 0.5, 0.5, 3.0])
    second = first * torch.tensor([1.0, 1 + 2e-6, 1.01, 0.5])
    clear = chosen_clearly(torch.stack([first, second], -1)[None, :, None])
    assert clear.flatten().tolist() == [False, False, True, True]
