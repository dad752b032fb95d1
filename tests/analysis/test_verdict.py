"""Where ours is below a rival by two standard errors, pieces and seeds both being drawn."""

import math

import pandas as pd
import pytest

from analysis.pretrained.table import OURS
from analysis.pretrained.verdict import apart, every, shown, verdicts

RIVAL = "static, query heads"
HERE = {"window": 1024, "text": "novels", "context": 8192}


def rows(contender: str, budget: float, by_seed: dict[int, list[float]]) -> list[dict[str, object]]:
    facts = HERE | {"contender": contender, "budget": budget, "cost": budget}
    return [
        facts | {"seed": seed, "piece": piece, "lost": lost}
        for seed, losses in by_seed.items()
        for piece, lost in enumerate(losses)
    ]


def test_the_error_is_over_pieces_and_over_seeds() -> None:
    # differences by seed and piece: (2, 4), (6, 8) hundredths: pieces 4, 6; seeds 3, 7
    ours = rows(OURS, 0.3, {0: [0.0, 0.0], 1: [0.0, 0.0]})
    theirs = rows(RIVAL, 0.3, {0: [0.02, 0.04], 1: [0.06, 0.08]})
    (row,) = apart(pd.DataFrame(ours + theirs), RIVAL, 1024).to_dict("records")
    assert row["below"] == pytest.approx(5)
    assert row["se"] == pytest.approx(math.hypot(1, 2))
    assert row["seeds"] == "2 against 2"


def test_seeds_of_ours_are_drawn_against_a_rival_of_one_seed() -> None:
    ours = rows(OURS, 0.3, {0: [0.0, 0.0], 1: [0.04, 0.04]})
    theirs = rows(RIVAL, 0.3, {7: [0.05, 0.07]})
    (row,) = apart(pd.DataFrame(ours + theirs), RIVAL, 1024).to_dict("records")
    assert row["below"] == pytest.approx(4)
    assert row["se"] == pytest.approx(math.hypot(1, 2))


def test_cells_are_counted_and_those_that_are_not_below_are_named() -> None:
    ours = [one for b in (0.3, 0.4, 0.5) for one in rows(OURS, b, {0: [0.0, 0.0]})]
    theirs = rows(RIVAL, 0.3, {0: [0.05, 0.06]}) + rows(RIVAL, 0.4, {0: [0.01, -0.01]})
    theirs += rows(RIVAL, 0.5, {0: [-0.05, -0.06]})
    frame = pd.DataFrame(ours + theirs)
    (row,) = verdicts(every(frame)).to_dict("records")
    assert (row["cells"], row["below"], row["level"], row["above"]) == (3, 1, 1, 1)
    assert "at 0.5: -5.50" in row["not below"] and "at 0.3" not in row["not below"]
    page = list(shown(frame))
    assert page[2] == "| **0.3, token x query head** | 1 | **0.00 +- 0.00** |  |  |  |"
    assert page[3] == "| 0.3, static, query heads | 1 | 5.65 +- 0.50 |  |  |  |"
