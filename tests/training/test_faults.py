"""What a run survives: kills at any moment, signals, disks that fill.

Also gradients that are not finite, and neighbours.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bayes_router.config import with_changes
from bayes_router.files import METRICS, STATE, SUMMARY, WEIGHTS
from bayes_router.training.fit import Interrupted, Trainer, fit
from tests.tiny import fit_config

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / WEIGHTS)


def assert_same_weights(got: Path, want: Path) -> None:
    a, b = weights(got), weights(want)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def kill_and_finish(corpus: str, out: Path, seed: int, kills: int) -> list[str]:
    """A fit that was killed `kills` times; the moments."""
    config = with_changes(
        fit_config(corpus, steps=40, checkpoint_every=2, eval_every=20), {"data.eval_tokens": 64}
    )
    fit(config, out / "alone", progress=False)
    (out / "settings.toml").write_text(config.to_toml())
    command = [
        sys.executable,
        "-m",
        "tests.training.killed_fits",
        out / "settings.toml",
        out / "killed",
        seed,
        kills,
    ]
    done = subprocess.run(
        [*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=280, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        line.removeprefix("killed: ")
        for line in done.stdout.splitlines()
        if line.startswith("killed: ")
    ]


@pytest.mark.slow
def test_killed_at_twelve_moments_a_run_ends_as_if_it_had_not_been(
    corpus: str, tmp_path: Path
) -> None:
    moments = kill_and_finish(corpus, tmp_path, seed=0, kills=12)
    assert len(moments) >= 12
    # at some time and at each of the five moments of writing a checkpoint, twice
    assert len(set(moments)) == 6
    assert_same_weights(tmp_path / "killed", tmp_path / "alone")
    columns = ["step", "nll", "kl", "valid_nll_hard", "skipped"]
    got, want = (pd.read_csv(tmp_path / run / METRICS)[columns] for run in ("killed", "alone"))
    pd.testing.assert_frame_equal(got, want)
    assert not list((tmp_path / "killed").glob(".*"))


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_which_then_resumes(
    corpus: str,
    finished_run: Path,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, before = Trainer.step, signal.getsignal(number)

    def step(self: Trainer, step: int):  # type: ignore[no-untyped-def]
        if step == 6:
            os.kill(os.getpid(), number)
        return usual(self, step)

    monkeypatch.setattr(Trainer, "step", step)
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"signal {int(number)} after step 7"):
        fit(fit_config(corpus, checkpoint_every=0), run, progress=False)
    assert signal.getsignal(number) == before
    monkeypatch.setattr(Trainer, "step", usual)
    seen: list[int] = []
    monkeypatch.setattr(
        Trainer, "step", lambda self, step: (seen.append(step), usual(self, step))[1]
    )
    fit(fit_config(corpus, checkpoint_every=0), run, resume=True, progress=False)
    assert seen == [7, 8, 9, 10, 11]
    assert_same_weights(run, finished_run)


def test_a_second_signal_ends_at_once(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Trainer, step: int):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(fit_config(corpus), tmp_path / "run", progress=False)
    assert not isinstance(stopped.value, Interrupted)


def test_the_command_line_says_how_to_go_on(corpus: str, tmp_path: Path) -> None:
    config = fit_config(corpus, steps=100_000, checkpoint_every=0, eval_every=0)
    (tmp_path / "settings.toml").write_text(config.to_toml())
    command = [
        sys.executable,
        "-m",
        "bayes_router",
        "fit",
        "--config",
        "settings.toml",
        "--out",
        "run",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "config.toml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "fit --resume" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / STATE).exists()


# Disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_checkpoint_that_cannot_be_written_is_missed_and_the_run_goes_on(
    corpus: str, finished_run: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == STATE:
            calls.append(target)
            if len(calls) == 1:
                raise OSError(number, os.strerror(number), str(target))
        usual(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.warns(RuntimeWarning, match="step 4: the checkpoint could not be written"):
        fit(fit_config(corpus), tmp_path / "run", progress=False)
    assert len(calls) == 3
    assert_same_weights(tmp_path / "run", finished_run)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_disk_that_stays_full_is_named_and_the_last_checkpoint_kept(
    corpus: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, written = torch.save, []

    def save(state: object, path: Path) -> None:
        usual(state, path)
        if written:  # as torch says it
            os.truncate(path, 1000)
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        written.append(path)

    monkeypatch.setattr(torch, "save", save)
    run = tmp_path / "run"
    with (
        pytest.warns(RuntimeWarning, match="step 8: the checkpoint could not be written"),
        pytest.raises(
            ValueError,
            match=(
                "out: expected to write to .*unexpected pos.*the last complete checkpoint was kept"
            ),
        ),
    ):
        fit(fit_config(corpus), run, progress=False)
    monkeypatch.setattr(torch, "save", usual)
    assert not (run / SUMMARY).exists()
    fit(fit_config(corpus), run, resume=True, progress=False)
    assert_same_weights(run, finished_run)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from bayes_router.config import load_config
from bayes_router.training.fit import fit
config, out, limit = load_config(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    fit(config, out, progress=False)
except ValueError as error:
    print(error)
"""


def test_a_file_that_the_system_cuts_short_is_no_checkpoint(corpus: str, tmp_path: Path) -> None:
    """The kernel refuses to write on after 20 kB of a file, inside torch's writer."""
    (tmp_path / "settings.toml").write_text(fit_config(corpus).to_toml())
    command = [sys.executable, "-c", FULL_DISK, "settings.toml", "run", "20000"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "expected to write to run" in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.toml", METRICS}


def test_a_folder_that_cannot_be_made_is_named(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="out: expected a folder that can be made"):
        fit(fit_config(corpus), tmp_path / "file" / "run", progress=False)
