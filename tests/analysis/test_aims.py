"""The aims of the pretrained study: verdicts by hand, and the page holds what the rows say."""

import pandas as pd

from analysis.pretrained import aims
from analysis.pretrained.table import OURS, RESULTS, lines

ROOT = RESULTS.parents[2]


def asked(whole: dict[tuple[int, int, float, int], list[bool]]) -> pd.DataFrame:
    """Prompts by (tokens, window, budget, seed); budget 1: unpatched."""
    return pd.DataFrame(
        {"contender": OURS, "window": window, "seed": seed, "text": "needle", "context": tokens,
         "budget": budget, "piece": i, "right": float(right), "nats": 1.0 - right, "cost": budget}
        for (tokens, window, budget, seed), prompts in whole.items()
        for i, right in enumerate(prompts)
    )  # fmt: skip


def test_a_loss_is_met_by_two_standard_errors_in_the_mean_or_missed() -> None:
    assert aims.judged(0.2, 0.1, 0.4) == "**met**, by two standard errors"
    assert aims.judged(0.2, 0.11, 0.4) == "**met** in the mean alone"
    assert aims.judged(0.5, 0.1, 0.4) == "**missed** by 0.10"


def test_prompts_are_counted_by_the_mean_over_seeds_and_the_largest_window() -> None:
    """Two fewer in one seed and none in the other are within one; three and none are not."""
    half, all_ = [True] * 3 + [False], [True] * 4
    two, three = [True] * 2 + [False] * 2, [True] + [False] * 3
    rows = {(8192, w, 1.0, s): all_ for w in (512, 256) for s in (0, 1)}
    rows |= {(2048, 256, 1.0, s): all_ for s in (0, 1)}
    rows |= {(8192, 512, 0.2, 0): two, (8192, 512, 0.2, 1): all_}
    rows |= {(8192, 256, 0.2, 0): three, (8192, 256, 0.2, 1): half}
    rows |= {(2048, 256, 0.3, 0): three, (2048, 256, 0.3, 1): half}
    (row,) = aims.retrieval(asked(rows))
    assert row["met"].startswith("**met** (beside it ")
    for named in ("2.0 fewer at 8192 tokens, 0.2, window 256", "2.0 fewer at 2048 tokens, 0.3"):
        assert named in row["met"]
    assert row["read"].startswith("1.0 fewer at worst") and row["n"].endswith("1 cell")
    rows[8192, 512, 0.2, 1] = half
    (row,) = aims.retrieval(asked(rows))
    assert row["met"].startswith("**missed**: 1.5 fewer at 8192 tokens, 0.2, window 512")
    none = {key: [False] * 4 for key in rows}
    (row,) = aims.retrieval(asked(none))
    assert row["met"].startswith("nothing to lose")
    cell = aims.wide(asked(rows)).set_index(["tokens", "window"]).loc[(8192, 512), "needle"]
    assert cell == "2, 3 of 4; 0.38 +- 0.24"


def test_one_patch_for_all_is_held_against_fits_made_at_each() -> None:
    rows = [
        {"contender": name, "window": 256, "seed": 0, "text": "novels", "context": 8192,
         "budget": budget, "piece": piece, "lost": lost + 0.01 * piece, "cost": budget}
        for budget, ours in ((0.3, 0.0005), (0.2, 0.004))
        for name, lost in ((OURS, ours), (f"{OURS}, fitted at one budget", 0.0))
        for piece in range(3)
    ]  # fmt: skip
    (row,) = aims.single(pd.DataFrame(rows))
    assert row["read"].startswith("in 1 of 2 cells; 0.23 more in the median, at worst 0.40 +- 0")
    assert row["read"].endswith("(novels at 0.2, window 256)") and row["met"] == "**missed** in 1"


def test_the_page_of_aims_holds_what_the_rows_say() -> None:
    page = (ROOT / "docs/aims.md").read_text(encoding="utf-8")
    assert [row for row in lines(aims.table()) if row not in page] == []
