"""The growth benchmark at toy size.

Ratios are those of its own rows, and start anew for each expert.
"""

import pytest

from analysis.speed.growth import measure


def test_ratios_are_to_the_length_before() -> None:
    frame = measure([128, 256])
    assert list(frame["expert"]) == ["full", "full", "linear", "linear", "local", "local"]
    assert frame["time_ratio"].isna().tolist() == [True, False] * 3
    for first in (0, 2, 4):
        assert frame["time_ratio"][first + 1] == pytest.approx(
            frame["ms"][first + 1] / frame["ms"][first]
        )
    assert (frame["ms"] > 0).all()
