"""What a newcomer waits for: the first answer, and one line for whatever cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bayes_router.cli import COMMANDS, build_parser, main
from bayes_router.commands import evaluate
from bayes_router.config import SURE_ENOUGH
from bayes_router.diagnostics.shown import SHOWN_TOKENS
from bayes_router.routing.prior import PRIOR_MAPS
from bayes_router.training.dial import TOLERANCE


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["fit", "--help"]])
def test_help_needs_no_torch_and_takes_no_second(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom bayes_router.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'numpy', 'pandas', 'pyro', 'scipy', 'seaborn', 'matplotlib'} & "
        "set(sys.modules)))"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
    assert len(done.stdout) > 5
    after = os.times()  # processor time of the whole process, which a busy machine does not change
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
        < 1
    )


@pytest.mark.parametrize("command", ["generate", "evaluate", "fit"])
def test_what_draws_and_fits_is_imported_when_something_is_drawn_or_fitted(command: str) -> None:
    missing = {"scipy", "seaborn", "matplotlib", "pandas", "transformers"} | (
        {"pyro"} if command != "fit" else set()
    )
    code = (
        f"import sys, bayes_router.cli, "
        f"bayes_router.commands.{command}\nprint(*sorted({missing!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_first_line_comes_before_torch(finished_run: Path) -> None:
    """What takes seconds is the import of torch.

    Held by that, not by a clock, a busy machine does not matter.
    """
    code = (
        "import sys\nfrom bayes_router.commands import parsers\nfrom bayes_router.cli import "
        "build_parser\n"
        "arguments = sys.argv[1:]\nparsed = build_parser(arguments).parse_args(arguments)\n"
        "parsers.COMMANDS[parsed.command].begin(parsed[parsed.command])\n"
        "print('|', 'torch' in sys.modules)"
    )
    run = str(finished_run)
    for arguments in (
        ["fit", "--out", "runs/new"],
        ["evaluate", run],
        ["generate", run, "--prompt", "The "],
        ["sweep", "--target-cost", "0.25"],
        ["inspect", run],
        ["report", run],
        ["bench"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        first, _, loaded = done.stdout.partition("|")
        assert len(first) > 3 and loaded.strip() == "False", arguments


def test_the_help_says_what_the_code_does() -> None:
    texts = {name: command.parser([]).format_help() for name, command in COMMANDS.items()}
    assert f"({SURE_ENOUGH})" in texts["evaluate"] and f"within {TOLERANCE}" in " ".join(
        texts["evaluate"].split()
    )
    assert ", ".join(sorted(PRIOR_MAPS)) in " ".join(texts["sweep"].split())
    options = build_parser([]).parse_args(["report", "runs/tiny"])
    assert options.report.tokens == SHOWN_TOKENS


def test_an_out_that_cannot_be_is_one_line(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("kept")
    folder.mkdir()
    below = file / "below"
    commands = {
        ("fit",): (below, file),
        ("evaluate", finished_run): (file, below),
        ("sweep", "--target-cost", 0.25): (file, below),
        ("report", finished_run): (folder, below, tmp_path / "none" / "r.html"),
        ("bench", "--quick"): (file, below),
    }
    if Path("/proc/version").exists():
        # nobody may write there
        commands = {command: (*outs, Path("/proc/none")) for command, outs in commands.items()}
    for command, outs in commands.items():
        for out in outs:
            assert main([*map(str, command), "--out", str(out)]) == 2, (command, out)
            error = capsys.readouterr().err
            assert error.startswith("bayes-router: out: expected") and error.count("\n") == 1, (
                command,
                out,
                error,
            )
    assert file.read_text() == "kept" and sorted(tmp_path.iterdir()) == [file, folder]


def test_an_error_of_the_system_is_one_line(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(options: object) -> None:
        raise OSError(28, "No space left on device", "runs/x/dial.csv")

    monkeypatch.setattr(evaluate, "run", full)
    assert main(["evaluate", str(finished_run)]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == "bayes-router: runs/x/dial.csv: No space left on device; free or name another path\n"
    )


@pytest.mark.parametrize(
    ("encoding", "prompt"),
    [("cp1252", "Łódź 日本".encode()), ("ascii", "Größe".encode()), ("utf-8", b"caf\xe9 ")],
)
def test_what_an_output_cannot_show_is_replaced(
    finished_run: Path, encoding: str, prompt: bytes
) -> None:
    arguments = [
        sys.executable,
        "-m",
        "bayes_router",
        "generate",
        str(finished_run),
        "--tokens",
        "5",
        "--prompt",
    ]
    done = subprocess.run(
        [os.fsencode(a) for a in arguments] + [prompt],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    error = done.stderr.decode(errors="replace")
    if encoding == "utf-8":  # the prompt is not
        assert done.returncode == 2 and error.count("\n") == 1
        assert error.startswith(
            "bayes-router: prompt: expected text in UTF-8; got the bytes b'caf\\xe9 '"
        )
    else:
        assert done.returncode == 0 and error == ""
        assert done.stdout.startswith(prompt.decode().encode(encoding, errors="replace"))
