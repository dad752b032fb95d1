"""The example of torchrun: two processes have the loss of one."""

import re
from pathlib import Path

import pytest

from tests.examples.test_examples import EXAMPLES, load
from tests.training.test_distributed import torchrun


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    text = tmp_path / "speech.txt"
    text.write_text(load("mini_router").SPEECH * 60, encoding="utf-8")
    corpus = f"text:{text}"
    alone = load("two_processes").main(tmp_path / "one", 3, corpus)
    done = torchrun(EXAMPLES / "two_processes.py", tmp_path / "two", 3, corpus)
    said = re.findall(r"(\d) processes, 3 steps, HARD ([\d.]+)", done.stdout)
    assert len(said) == 1 and said[0][0] == "2"
    assert float(said[0][1]) == pytest.approx(alone["nll"]["hard"], abs=2e-4)
