"""The growth benchmark at toy size.

Ratios are those of its own rows, and start anew for each expert.
"""

import inspect

import pytest

from analysis.speed import growth


def test_ratios_are_to_the_length_before(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = inspect.signature(growth.peak_bytes)

    def peak(*args: object, **named: object) -> int:
        """What a process of its own would measure, which takes seconds."""
        return 2**20 * taken.bind(*args, **named).arguments["T"]

    monkeypatch.setattr(growth, "peak_bytes", peak)
    frame = growth.measure([128, 256])
    assert list(frame["expert"]) == ["full", "full", "linear", "linear", "local", "local"]
    assert frame["time_ratio"].isna().tolist() == [True, False] * 3
    for first in (0, 2, 4):
        assert frame["time_ratio"][first + 1] == pytest.approx(
            frame["ms"][first + 1] / frame["ms"][first]
        )
    assert (frame["ms"] > 0).all()
    assert frame["peak_mib"].tolist() == [128, 256] * 3
    assert frame["memory_ratio"].dropna().tolist() == [2.0] * 3
