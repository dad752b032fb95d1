"""How far a piece of work is.

A bar where standard error is a terminal, elsewhere a line every few seconds.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

SECONDS = 5.0
"""Between two lines where there is no terminal."""
REFRESH = 1.0
"""Between two looks at the clock of a bar, so that it moves while one step takes long."""


class Progress:
    """Tells on standard error how far a piece of work is, for as long as the `with` block runs.

    On a terminal it draws a bar. Elsewhere it writes a line each time that `SECONDS` have passed,
    also in the middle of a step; work that is done sooner writes nothing.

    Args:
        what: the work, as a word or two.
        total: steps of all; None where nobody knows.
        done: steps that were done before.
        unit: what a step is called.
        shown: False keeps silent.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        done: int = 0,
        unit: str = "step",
        shown: bool = True,
    ):
        self.what, self.total, self.done, self.unit, self.shown = what, total, done, unit, shown
        self.words = ""
        self.stream: TextIO = sys.stderr
        self.bar: Any = None
        self._ended = threading.Event()
        self._clock: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        """Begin."""
        if self.shown:
            self.started = time.perf_counter()
            if self.stream.isatty():
                from tqdm import tqdm

                self.bar = tqdm(
                    total=self.total,
                    initial=self.done,
                    desc=self.what,
                    unit=self.unit,
                    dynamic_ncols=True,
                    file=self.stream,
                )
            self._clock = threading.Thread(
                target=self._tick, args=(SECONDS if self.bar is None else REFRESH,), daemon=True
            )
            self._clock.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """End."""
        self._ended.set()
        if self._clock is not None:
            self._clock.join()
        if self.bar is not None:
            self.bar.close()

    def step(self, count: int = 1) -> None:
        """So many steps more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)

    def say(self, words: str) -> None:
        """What is being done, or how it goes."""
        self.words = words
        if self.bar is not None:
            self.bar.set_postfix_str(words)

    def line(self, text: str) -> None:
        """A line of its own, at once, where there is no bar."""
        if self.shown and self.bar is None:
            print(text, file=self.stream, flush=True)

    def above(self, text: str) -> None:
        """A line of the result, to standard output, above the bar where there is one."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stdout)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, one step each."""
        with self:
            for item in items:
                yield item
                self.step()

    def _tick(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            if self.bar is not None:
                self.bar.refresh()
            else:
                self.line(self._line())

    def _line(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        words = f", {self.words}" if self.words else ""
        return (
            f"{self.what}: {self.done}{of} {self.unit}s{words}, "
            f"{time.perf_counter() - self.started:.0f} s"
        )
