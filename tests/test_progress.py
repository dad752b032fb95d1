"""A bar on a terminal, a line every few seconds elsewhere.

Nothing for work that is done at once.
"""

import io
import time

import pytest

from bayes_router import progress
from bayes_router.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_while_one_step_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    with Progress("reading", 3, unit="window") as bar:
        bar.step()
        bar.say("nll 1.5")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4 and lines[0].startswith("reading: 1 of 3 windows, nll 1.5, ")
    time.sleep(0.1)
    assert capsys.readouterr().err == ""  # ended


def test_what_is_done_at_once_and_what_is_not_shown_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(Progress("reading", 3).over("abc")) == ["a", "b", "c"]
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    with Progress("reading", shown=False) as bar:
        bar.line("a line")
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "REFRESH", 0.02)
    with Progress("solving", unit="window") as bar:  # nobody knows how many
        bar.step()
    with Progress("reading", 4, done=1, unit="window") as bar:
        bar.step(2)
        bar.say("nll 1.5")
        bar.line("only without a bar")
        before = terminal.getvalue()
        time.sleep(0.1)
        assert len(terminal.getvalue()) > len(before)  # the clock of the bar goes on by itself
    shown = terminal.getvalue()
    assert (
        "3/4" in shown
        and "nll 1.5" in shown
        and "reading:" in shown
        and "only without" not in shown
    )
