"""Every code block of the README runs, in order, as one session.

Every command that it names exists.
"""

import re
from pathlib import Path

import pytest

from bayes_router.cli import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)


def test_the_python_blocks_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "\n".join(code for language, code in BLOCKS if language == "python")
    assert source.count("\n") > 20
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    # what it shows is what it prints
    assert all(code in printed for language, code in BLOCKS if language == "text")


def test_the_commands_exist() -> None:
    named = set(
        re.findall(
            r"^bayes-router (\w+)",
            "\n".join(code for language, code in BLOCKS if language == "sh"),
            flags=re.M,
        )
    )
    assert named and named <= set(COMMANDS)


def test_the_files_that_it_links_exist() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
