"""The pages build strictly and their links lead somewhere.

Their Python runs, and what they name exists.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bayes_router
from bayes_router.attention.experts.contract import _REGISTRY
from bayes_router.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / name for name in ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")]
LINKED = [*PAGES, *OTHERS, *sorted((ROOT / "analysis").glob("*.md"))]
RUN = [
    p
    for p in PAGES
    if "```python" in p.read_text(encoding="utf-8") and p.name not in ("README.md",)
]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(ROOT / "docs" / "mkdocs.yml"),
    ]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "excluded from the built site" not in said, said  # a link that works in a checkout alone
    api = (tmp_path / "docs" / "api.html").read_text(encoding="utf-8")
    missing = [
        name
        for name in bayes_router.__all__
        if not re.search(rf'id="bayes_router\.[\w.]+\.{name}"', api)
    ]
    assert not missing


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in page.read_text(encoding="utf-8"):
        pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.chdir(tmp_path)
    source = "\n".join(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    )
    before = set(_REGISTRY)
    try:
        exec(compile(source, page.name, "exec"), {"__name__": "page"})
    finally:
        for name in set(_REGISTRY) - before:
            _REGISTRY.pop(name)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:examples|notebooks|docs|analysis|tests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (analysis[\w.]*)", text):
        home = ROOT / module.replace(".", "/")
        assert home.with_suffix(".py").is_file() or (home / "__main__.py").is_file(), module
    assert set(re.findall(r"bayes-router ([a-z]+)\b", text)) <= set(COMMANDS)


def test_every_command_is_on_its_page() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f"| `{name}` | {command[0]} |" in page


def test_every_example_is_on_its_page() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(examples/\w+\.py)`", page, flags=re.M)) == {
        f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")
    }
