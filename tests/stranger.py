"""A stranger with the README alone: its commands in their order, in a new environment.

`make stranger`; not part of the suite, for it downloads what the README says and takes minutes.
From the first command to the report of a patch that was fitted and saved it takes less than
fifteen; what is trained from scratch comes after.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", flags=re.S)
LIMIT = 15 * 60
TORCH_INDEX = os.environ.get("TORCH_INDEX", "")


def blocks(*sections: str) -> list[tuple[str, str]]:
    """Language and text of each block below these headings of the README."""
    parts = re.split(r"^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    named = {part.split("\n", 1)[0]: part for part in parts}
    return [block for section in sections for block in BLOCKS.findall(named[section])]


class Stranger:
    """Who copies blocks into a shell, in a copy of the repository and an environment of its own."""

    def __init__(self, home: Path):
        self.home, self.printed = home / "bayes-router", ""
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (self.home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.home / name)
        subprocess.check_call([sys.executable, "-m", "venv", str(home / "env")])
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environment = {**kept, "PATH": f"{home / 'env' / 'bin'}{os.pathsep}{kept['PATH']}"}

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line, and say how long it took."""
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=2 * LIMIT,
        )
        print(f"{time.monotonic() - began:6.0f} s  {line.splitlines()[0]}", flush=True)
        return done

    def copy(self, language: str, text: str) -> None:
        """A block: shell line by line, Python as a file, text as what Python has printed."""
        if language == "text":
            assert text in self.printed
            return
        if language == "python":
            (self.home / "block.py").write_text(text, encoding="utf-8")
        for line in ["python block.py"] if language == "python" else text.splitlines():
            done = self.shell(line)
            index = re.search(r" --index-url \S+", line)
            if done.returncode and index:  # an index that is not reached from here
                own = f" --index-url {TORCH_INDEX}" if TORCH_INDEX else ""
                done = self.shell(line.replace(index[0], own))
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            self.printed = done.stdout if language == "python" else self.printed


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    made = Stranger(tmp_path_factory.mktemp("stranger"))
    tried = made.shell("python -m pip download --quiet --no-deps --dest ../try tqdm")
    if tried.returncode:
        pytest.skip(f"no package index is reached from here: {tried.stderr[-300:]}")
    return made


def test_a_model_is_patched_fitted_saved_and_reported_on(stranger: Stranger) -> None:
    began, spent = time.monotonic(), os.times()
    for language, text in blocks("Install", "Patch a model"):
        stranger.copy(language, text)
    took, now = time.monotonic() - began, os.times()
    busy = now.children_user + now.children_system - spent.children_user - spent.children_system
    print(f"{took:6.0f} s  from the first command to the report; {busy:.0f} s of processor time")
    assert "<html" in (stranger.home / "routed" / "report.html").read_text(encoding="utf-8")
    assert took < LIMIT


def test_the_rest_of_the_page(stranger: Stranger) -> None:
    for language, text in blocks("Train one", "Pyro, in ten lines"):
        stranger.copy(language, text)
    assert "<html" in (stranger.home / "runs/tiny/report.html").read_text(encoding="utf-8")
