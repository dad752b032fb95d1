"""Every command that a page shows is valid today: in blocks of sh, and between backticks.

Each is taken by the parser that it would meet: options, types and what is required. What installs
or builds is looked up: targets of the Makefile, extras, files.
"""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from analysis.speed import kernels
from bayes_router.cli import COMMANDS, build_parser
from tests.test_docs import LINKED, ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STARTS = re.compile(r"(?:[A-Z_]+=\S+ |time )*(python|bayes-router|make|torchrun|mkdocs|pip) ")
KNOWN = (
    "source <(bayes-router --print_completion bash)",  # tests/commands/test_completion.py
    ".venv/bin/pre-commit install",
)


class Taken(Exception):
    """The parser took the command, which shall not run."""


def ours(words: list[str]) -> None:
    """`bayes-router WORDS`."""
    words = words[: words.index(">")] if ">" in words else words
    if "--resume" in words:  # whose settings are those of a run
        words.remove("--resume")
    if words[0] in COMMANDS and (len(words) == 1 or "--help" in words):
        return
    if "--print_completion" in words or words == ["COMMAND", "--help"]:
        return
    if "--config" in words:  # a file that an earlier command wrote
        at = words.index("--config")
        words = words[:at] + words[at + 2 :]
    if words[:2] == ["evaluate", "--budget"]:  # the name of an option, not a line to copy
        words = ["evaluate", "RUN", "--budget", "0.5"]
    assert build_parser(words).parse_args(words).command in COMMANDS


def module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m WORDS`, up to the point where its options are read."""
    name, options = words[0], words[1:]
    if name == "pip":
        extras = {e for found in re.findall(r"\[([\w,]+)\]", words[-1]) for e in found.split(",")}
        assert words[1] == "install" and extras <= set(PROJECT["optional-dependencies"])
        return
    if name == "pytest":
        assert {"-m", "gpu"} <= set(options)
        return
    home = ROOT / name.replace(".", "/")
    assert home.with_suffix(".py").is_file() or (home / "__main__.py").is_file(), name
    if not options:
        return
    if name == "analysis.speed.kernels":  # `bayes-router bench` by another name
        return ours(["bench", *kernels.own(options)[1]])
    options = [{"RATE": "0.001"}.get(word, word.strip("[]")) for word in options]
    parse = argparse.ArgumentParser.parse_args

    def take(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        parse(parser, *given, **named)
        raise Taken

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", take)
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(Taken):
        runpy.run_module(name, run_name="__main__")
    monkeypatch.undo()


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where nothing takes `command`."""
    if command in KNOWN:
        return
    words = shlex.split(command, comments=True)
    while words and ("=" in words[0] or words[0] == "time"):
        words = words[1:]
    program, rest = Path(words[0]).name, words[1:]
    if program == "bayes-router":
        ours(rest)
    elif program == "make":
        targets = [word for word in rest if "=" not in word]
        assert targets and all(re.search(rf"^(\w+ )*{t}[ :]", MAKEFILE, re.M) for t in targets)
    elif program == "torchrun":
        parsed = get_args_parser().parse_args(rest)
        script = [parsed.training_script, *parsed.training_script_args]
        if not parsed.module:
            assert (ROOT / script[0]).is_file()
        elif script[0] == "bayes_router":
            ours(script[1:])
        else:
            module(script, monkeypatch)
    elif program == "python" and rest[0] == "-m":
        module(rest[1:], monkeypatch)
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    elif program == "mkdocs":
        assert rest[0] == "build" and (ROOT / rest[rest.index("--config-file") + 1]).is_file()
    else:
        assert words[:2] == ["pip", "install"], "nothing here checks it"


def commands(page: Path) -> list[str]:
    """Lines of its sh blocks, and what stands between backticks and begins as a command does."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [part for line in lines for part in line.split("  #")[0].split(" && ")]
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    shown += [" ".join(span.split()) for span in spans if STARTS.match(" ".join(span.split()))]
    return [line.strip() for line in shown if line.strip()]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_commands_are_valid_today(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        try:
            check(command, monkeypatch)
        except (AssertionError, SystemExit, ValueError, IndexError) as error:
            pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "make fits",
        "python -m analysis.routes.nothing",
        "python -m analysis.routes.tiny_lm --sizes cpu",
        "python -m analysis.speed.training_step --rounds many",
        "torchrun --nproc-per-node 2 -m bayes_router fit --preset tinny",
        "torchrun --processes 2 examples/two_processes.py",
        "python -m pip install '.[demos]'",
        "bayes-router fit --preset tiny --trian.steps 3",
        "conda install bayes-router",
    ],
)
def test_a_command_that_is_not_valid_is_found(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(command, monkeypatch)


def test_pages_have_commands() -> None:
    assert len(commands(ROOT / "README.md")) > 10
    assert len(commands(ROOT / "analysis" / "README.md")) > 8
