"""A finding in words: what was seen, how it compares with a threshold, and what to try."""

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple


class Severity(Enum):
    """How much a finding matters."""

    GOOD = "good"
    NOTE = "note"  # worth knowing, nothing is broken
    WARNING = "warning"  # do not rely on it as it is


class Verdict(NamedTuple):
    """One finding of a diagnostic."""

    topic: str  # what was examined: routing collapse, posterior collapse, guide, calibration, ...
    severity: Severity
    text: str  # a sentence with the figure and the threshold in it
    advice: str = ""  # what to try; empty where nothing is wrong
    layers: tuple[int, ...] = ()  # none: all layers together
    basis: str = ""  # from how much it was read, and the interval where the sentence has none

    def __str__(self) -> str:
        advice = f" Try: {self.advice}" if self.advice else ""
        basis = f" ({self.basis})" if self.basis else ""
        return f"[{self.severity.value}] {self.topic}{self.where}: {self.text}{basis}{advice}"

    @property
    def where(self) -> str:
        """The layers in words."""
        listed = ", ".join(map(str, self.layers))
        return "" if not self.layers else f", layer{'s' if len(self.layers) > 1 else ''} {listed}"


def merged(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Verdicts that say the same of several layers as one."""
    found: dict[tuple[str, str], Verdict] = {}
    for verdict in verdicts:
        key = (verdict.topic, verdict.text)
        known = found.get(key)
        found[key] = (
            verdict if known is None else verdict._replace(layers=known.layers + verdict.layers)
        )
    return list(found.values())
