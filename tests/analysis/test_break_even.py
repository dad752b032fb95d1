"""The command that measures from how many keys on a backend is the faster."""

import re

import pytest

from analysis.speed import break_even


def test_it_prints_every_measurement_and_the_break_even_points(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["break_even", "--lengths", "8", "16", "--seconds", "0.001"])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # other tests keep theirs
    break_even.main()
    shown = capsys.readouterr().out
    assert (
        len(
            re.findall(
                r"^ +(8|16) +[18] +\d+/\d+/\d+ +[\d.]+ +[\d.]+x +[\d.]+x$", shown, re.MULTILINE
            )
        )
        == 2 * 2 * 2 * 2
    )
    assert len(re.findall(r"^dense up to (0|8|16) keys, then torch$", shown, re.MULTILINE)) == 2
