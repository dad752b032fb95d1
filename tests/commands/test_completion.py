"""The shell completes commands and options, as bash does when Tab is pressed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bayes_router import cli
from bayes_router.cli import main

ASK = """
source "$1"
function=$(complete -p bayes-router | sed 's/.*-F \\([^ ]*\\).*/\\1/')
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        $function "$1" "${!#}" "${COMP_WORDS[COMP_CWORD - 1]}"; echo "${COMPREPLY[@]}"; }
ask bayes-router rep
ask bayes-router fit --train.sha
ask bayes-router report --qui
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print_completion", "bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    done = subprocess.run(
        ["bash", "-c", ASK, "ask", str(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["report", "--train.shard", "--quick"]


def test_what_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--print_completion", "fish"]) == 2
    said = capsys.readouterr().err
    assert "--print_completion: expected one of bash, tcsh, zsh; got 'fish'" in said
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert main(["--print_completion", "zsh"]) == 2
    said = capsys.readouterr().err
    assert "expected the package shtab; run pip install -e '.[completion]'" in said
