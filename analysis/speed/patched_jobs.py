"""Several processes, each on a card of its own, that divide the groups of one table."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import torch


class Stopped(BaseException):
    """Somebody ends this program from outside."""


@contextmanager
def stoppable() -> Iterator[None]:
    """End what is inside where this process is told to terminate; what was read by then stays."""

    def stop(*_: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Stopped:
        print("stopped from outside: what was read by then is kept", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)


class Jobs:
    """This process as one of several, which meet in a folder: what it takes, what it found."""

    def __init__(self, folder: Path, number: int, of: int):
        self.folder, self.number, self.of = folder, number, of

    def take(self, name: str) -> bool:
        """Whether nobody took this before."""
        try:
            os.close(os.open(self.folder / f"{name}.taken", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def mine(self, work: Sequence[Any]) -> list[Any]:
        """A fixed part of what all have to do."""
        return list(work[self.number :: self.of])

    def checked(self, wrong: Sequence[str]) -> None:
        """Say what differs; nothing does where it is empty."""
        (self.folder / f"{self.number}.checked").write_text("; ".join(wrong))

    def table(self) -> Path:
        """Where the rows go that are read here."""
        return self.folder / f"{self.number}.csv"


def run(folder: Path, number: int, work: Callable[[Jobs], None]) -> None:
    """Do the work in so many processes at a time, the cards shared out among them.

    They are forks of this one, which must not have used a card: what it imported, they have.

    Raises:
        SystemExit: a job failed, or finds that what it computes differs. All are stopped.
    """
    cards, fork = torch.cuda.device_count(), multiprocessing.get_context("fork")
    started, told = list[BaseProcess](), list[int]()
    # who is told to stop stops when all jobs can be, and no second time: none is left behind
    stop = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        for job in range(number):
            card = visible(job % cards) if cards else None
            mine = Jobs(folder, job, number)
            started.append(fork.Process(target=on_card, args=(card, work, mine)))
            started[-1].start()
        signal.signal(signal.SIGTERM, stop)
        if told:
            signal.raise_signal(signal.SIGTERM)
        while any(job.is_alive() for job in started):
            refuse(folder, number, started)
            time.sleep(0.1)
        refuse(folder, number, started, ended=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for job in started:
            job.kill()
            job.join()
        signal.signal(signal.SIGTERM, stop)


def on_card(card: str | None, work: Callable[[Jobs], None], mine: Jobs) -> None:
    """The work of one process, which sees one card."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if card is None:
        torch.set_num_threads(1)  # a fork would wait for threads that only its parent has
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = card
    work(mine)


def visible(card: int) -> str:
    """The name of a card, among those that this process may see."""
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    return known.split(",")[card] if known else str(card)


def refuse(
    folder: Path, number: int, started: Sequence[BaseProcess] = (), ended: bool = False
) -> None:
    """SystemExit where what a job computes differs, or was not compared, or where a job failed."""
    said = [folder / f"{job}.checked" for job in range(number)]
    wrong = [text for path in said if path.exists() and (text := path.read_text())]
    if wrong:
        sys.exit("nothing is reported, these differ: " + "; ".join(wrong))
    failed = [index for index, job in enumerate(started) if job.exitcode]
    if failed or (ended and not all(path.exists() for path in said)):
        sys.exit(f"nothing is reported, these jobs failed: {failed}")


def merge(folder: Path, number: int, order: Sequence[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Each group in this order, and its rows, whichever job read it."""
    tables = [path for job in range(number) if (path := folder / f"{job}.csv").exists()]
    found = [row for path in tables for row in pd.read_csv(path).to_dict("records")]
    for group in order:
        facts = group._asdict()
        yield group, [row for row in found if all(row[key] == facts[key] for key in facts)]
