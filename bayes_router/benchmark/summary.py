"""What a table of the benchmark says, in lines.

Where routing loses, memory, growth, and what was left out.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ALLOWED = 1.05  # times full attention's, the time that `auto` may take
CLOCKS = {"busy stream": "speedup", "isolated calls": "wall_speedup"}


def closing(table: "pd.DataFrame") -> list[str]:
    """Every line that a table of the benchmark ends with."""
    return [
        *break_even(table),
        *worst(table),
        *training_memory(table),
        *growth(table),
        *_left_out(table),
    ]


def break_even(table: "pd.DataFrame") -> list[str]:
    """Where routing begins to pay, for each pass, mix and shape, by each clock.

    The shortest text from which routing stays ahead of full attention.
    """
    lines, rows, keys = [], _automatic(table), ["what", "mix", "run", "B", "H", "Dh"]
    for (what, mix, run, *sizes), group in rows.groupby(keys, sort=False) if len(rows) else ():
        regions = {
            clock: _region(group, column) for clock, column in CLOCKS.items() if column in group
        }
        one = len(set(regions.values())) == 1  # a CPU has one clock
        said = (
            regions["busy stream"]
            if one
            else "; ".join(f"{clock}: {said}" for clock, said in regions.items())
        )
        said += _missed(table, (what, mix, run, *sizes), sorted(group["T"].unique()))
        lines.append(f"{what} {mix}, runs of {run}, B{sizes[0]} H{sizes[1]} Dh{sizes[2]}: {said}")
    return lines


def _automatic(table: "pd.DataFrame") -> "pd.DataFrame":
    """What a user gets who asks for no backend."""
    rows = table[table["variant"].isin(["auto", "cache"])]
    return rows if rows.empty else rows.astype({"run": int})


def _region(group: "pd.DataFrame", column: str) -> str:
    speedup = group.groupby("T")[column].min()  # by T, ascending
    lost = speedup[speedup < 1]
    if lost.empty:
        lengths = speedup.index
        which = "the one length" if len(lengths) == 1 else f"all {len(lengths)} lengths"
        return f"ahead at {which} measured ({', '.join(map(str, lengths))})"
    won = speedup[speedup.index > lost.index.max()]
    where = f"ahead from {won.index.min()} tokens" if len(won) else "ahead nowhere"
    said = f"{where}, loses up to {lost.index.max()} ({lost.min():.2f}x at {lost.idxmin()})"
    slow = [str(T) for T, x in speedup.items() if x < 1 / ALLOWED]
    return f"{said}, slower than {ALLOWED}x full at {', '.join(slow)}" if slow else said


def _missed(table: "pd.DataFrame", case: tuple[Any, ...], measured: list[int]) -> str:
    """The lengths of a case that there was no time for.

    Shorter ones are where routing loses, if anywhere.
    """
    lengths = sorted(T for *of, T in table.attrs.get("missed", []) if tuple(of) == case)
    shorter = [str(T) for T in lengths if measured[0] > T]
    others = [str(T) for T in lengths if measured[0] < T]
    said = (
        f"; not measured, and shorter, where routing may lose: {', '.join(shorter)}"
        if shorter
        else ""
    )
    return said + (f"; not measured: {', '.join(others)}" if others else "")


def worst(table: "pd.DataFrame") -> list[str]:
    """The row where `auto` takes longest beside full attention, by each clock."""
    said: dict[str, list[str]] = {}
    rows = _automatic(table)
    for clock, column in CLOCKS.items():
        if column in rows and rows[column].notna().any():
            row = rows.nsmallest(1, column).iloc[0]
            where = (
                f"{row['what']} {row['mix']}, runs of {row['run']}, B{row['B']} H{row['H']} "
                f"T{row['T']} Dh{row['Dh']}"
            )
            said.setdefault(f"{1 / row[column]:.2f}x full attention's time ({where})", []).append(
                clock
            )
    return [
        f"worst auto, {', '.join(clocks)}: {text}; at most {ALLOWED}x is the aim"
        for text, clocks in said.items()
    ]


def training_memory(table: "pd.DataFrame") -> list[str]:
    """Peak memory of a pass with its backward pass over full attention's."""
    rows = table[table["what"].eq("training memory") & table["variant"].ne("full")]
    return [
        f"training memory {row['variant']}, B{row['B']} H{row['H']} T{row['T']} Dh{row['Dh']}: "
        f"{row['over_full']:.2f}x full attention's ({row['peak_mib']:.0f} MiB)"
        for _, row in rows.iterrows()
    ]


def growth(table: "pd.DataFrame") -> list[str]:
    """How time and memory of linear and local attention alone grow when the text doubles.

    2 is linear.
    """
    lines = []
    alone = table[table["what"] == "alone"]
    for (name, H, Dh), group in alone.groupby(["variant", "H", "Dh"], sort=False):
        ends = group.sort_values("T").iloc[[0, -1]]
        if ends["T"].nunique() == 2:
            span = (
                f"{name} alone, H{H} Dh{Dh}, a doubling from T {ends['T'].iloc[0]} to "
                f"{ends['T'].iloc[1]}"
            )
            lines.append(f"{span}: {', '.join(_doublings(group))}")
    return lines


def _doublings(group: "pd.DataFrame") -> Iterator[str]:
    for column, what in (("time_growth", "time"), ("memory_growth", "memory")):
        if column in group and group[column].notna().any():
            yield f"{what} {group[column].median():.2f}x (at most {group[column].max():.2f}x)"


def _left_out(table: "pd.DataFrame") -> list[str]:
    return [f"left out for want of time: {text}" for text in table.attrs.get("left_out", [])]
