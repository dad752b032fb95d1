"""Fixtures: a small corpus of real text, and one finished run of it for all tests that read a run."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

import bayes_router
from bayes_router.training.fit import fit
from tests.tiny import fit_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of documents: this package's own source, about 200 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(bayes_router.__file__).parent.rglob("*.py")):
        (folder / f"{path.parent.name}_{path.stem}.txt").write_bytes(path.read_bytes())
    return str(folder)


@pytest.fixture(scope="session")
def finished_run(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a fit that took seconds; read it, do not write to it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(fit_config(corpus), out, progress=False)
    return out
