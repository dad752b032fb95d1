"""Every notebook runs from top to bottom; its committed outputs are those of its code."""

import os
import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
STORIES = ("01_fit_with_svi.ipynb", "02_routing_uncertainty.ipynb", "03_choose_prior.ipynb")
# what an optional extra installs
NEEDS = {"04_patch_pretrained.ipynb": "transformers", "05_your_own_parts.ipynb": "arviz"}
NOTEBOOKS = (*STORIES, *NEEDS)
SECONDS = 120  # of one core


def test_no_notebook_is_forgotten():
    found = {path.name for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert found == set(NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    NotebookClient(notebook, timeout=600, kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}}).execute()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < SECONDS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_committed_in_order_and_without_errors(name):
    cells = [c for c in nbformat.read(ROOT / "notebooks" / name,
        as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for c in cells for output in c.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert name not in STORIES or figures >= 2


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_between_notebooks_lead_somewhere(name):
    text = "".join(c.source for c in nbformat.read(ROOT / "notebooks" / name,
        as_version=4).cells if c.cell_type == "markdown")
    for target in [part.split(")")[0] for part in text.split("](")[1:]]:
        assert (ROOT / "notebooks" / target).is_file()
