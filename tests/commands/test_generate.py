"""`bayes-router generate`: stop tokens; `test_cli.py` has the rest."""

from pathlib import Path

import pytest

from bayes_router.cli import main


def generate(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert (
        main(
            [
                "generate",
                str(run),
                "--prompt",
                "The ",
                "--tokens",
                "40",
                "--temperature",
                "1",
                *options,
            ]
        )
        == 0
    )
    return capsys.readouterr().out


def test_a_stop_token_ends_the_text(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = generate(finished_run, capsys)
    plain = next(c for c in free[9:-1] if c.isascii())
    first, *_ = free[4:].split(plain)
    assert generate(finished_run, capsys, "--stop", plain) == f"The {first}{plain}\n"
    assert len(generate(finished_run, capsys, "--stop", plain, *"etaoin")) <= len(first) + 6


@pytest.mark.parametrize(("text", "count"), [("ab", 2), ("", 0), ("\N{EURO SIGN}", 3)])
def test_a_stop_that_is_no_single_token_is_refused(
    finished_run: Path, text: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(finished_run), "--prompt", "x", "--stop", "a", text]) == 2
    out, error = capsys.readouterr()
    assert out == "x\n"  # the prompt, which stands there before torch is loaded
    assert (
        f"stop: expected texts of one token of the tokeniser 'bytes'; got {text!r}, {count} tokens"
        in error
    )
    assert error.count("\n") == 1


def test_bad_arguments_are_refused_before_anything_is_generated(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(finished_run), "--prompt", "x", "--tokens", "0"]) == 2
    assert capsys.readouterr().out == ""
