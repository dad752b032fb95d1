"""The command line as a newcomer meets it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bayes_router.cli import COMMANDS, main
from bayes_router.config import load_config

QUICK = [
    "--model.d_model=16",
    "--model.num_layers=2",
    "--model.num_heads=2",
    "--data.context=32",
    "--data.eval_tokens=512",
]


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_help_explains_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "usage" in text and len(text) > 300


def test_a_reader_that_stops_is_no_error() -> None:
    command = [sys.executable, "-m", "bayes_router", "sweep", "--target-cost", "0.25"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_fit_evaluate_generate(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [
        "fit",
        "--corpus",
        f"text:{corpus}",
        "--steps",
        8,
        "--seed",
        3,
        "--device",
        "cpu",
        "--out",
        out,
        "--quiet",
        *QUICK,
        "--model.window=8",
    ]
    assert run(*arguments) == 0
    text = capsys.readouterr().out
    assert "HARD" in text and str(out) in text
    config = load_config(out / "config.toml")
    assert (config.train.steps, config.train.seed, config.model.d_model) == (8, 3, 16)
    assert {path.name for path in (out / "figures").iterdir()} == {
        "losses.png",
        "cost_nll.png",
        "load.png",
        "terms.png",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert run("evaluate", out, "--freeze", 0.49) == 0
    read = capsys.readouterr().out
    assert f"HARD {summary['nll']['hard']:.4f}" in read
    (sizes,) = re.findall(r"cache of 32 tokens: ([\d,]+) -> ([\d,]+) bytes", read)
    before, after = (int(size.replace(",", "")) for size in sizes)
    assert "2 of 2 units frozen" in read and 0 < after <= before
    assert run("evaluate", out, "--free", 0.1) == 0
    read = capsys.readouterr().out
    (sizes,) = re.findall(r"cache of 32 tokens: ([\d,]+) -> ([\d,]+) bytes", read)
    before, after = (int(size.replace(",", "")) for size in sizes)
    assert "2 of 4 key heads keep 8 keys" in read and 0 < after < before
    assert (
        run("generate", out, "--prompt", "def ", "--tokens", 12, "--temperature", 0, "--routes")
        == 0
    )
    first = capsys.readouterr().out
    assert first.startswith("def ") and "full" in first
    assert (
        run("generate", out, "--prompt", "def ", "--tokens", 12, "--temperature", 0, "--routes")
        == 0
    )
    assert capsys.readouterr().out == first
    assert run("fit", "--resume", "--out", out, "--quiet") == 0
    assert run(*arguments) == 2
    assert "--overwrite or --resume" in capsys.readouterr().err


def test_a_file_and_dotted_options_override_the_preset(corpus: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[train]\nsteps = 3\nlr = 0.001\n")
    out = tmp_path / "run"
    done = run(
        "fit",
        "--config",
        file,
        "--train.lr",
        0.002,
        "--corpus",
        f"text:{corpus}",
        "--out",
        out,
        "--quiet",
        "--device=cpu",
        *QUICK,
    )
    assert done == 0
    config = load_config(out / "config.toml")
    assert (config.train.steps, config.train.lr) == (3, 0.002)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["fit", "--preset", "huge"], "preset: expected one of base, small, tiny; got 'huge'"),
        (["fit", "--preset", "tiniy"], "got 'tiniy'; did you mean tiny?"),
        (
            ["fit", "--corpus", "bible"],
            "corpus: expected one of hf:NAME, recall, sotu, stdlib, text:PATH; got 'bible'",
        ),
        (["fit", "--corpus", "stdlb"], "text:PATH; got 'stdlb'; did you mean stdlib?"),
        (
            ["fit", "--corpus", "/proc"],
            "expected text:PATH for a file or folder; got '/proc'; did you mean text:/proc?",
        ),
        (["fit", "--corpus", "text:/nowhere"], "no such path"),
        (["fit", "--steps", "many"], "steps: expected an integer; got 'many'"),
        (["fit", "--steps"], "--steps: expected a value; got none"),
        (["fit", "--train.lr", "fast"], "train.lr: expected a number; got 'fast'"),
        (["fit", "--train.compile", "maybe"], "train.compile: expected true or false; got 'maybe'"),
        (
            ["fit", "--model.experts", "full"],
            "model.experts: expected a list, as [a,b]; got 'full'",
        ),
        (
            ["fit", "--prior.cost_ratio", "[a]"],
            "prior.cost_ratio: expected a list, as [a,b]; got \"['a']\"",
        ),
        (["fit", "--preset"], "--preset: expected a value; got none"),
        (
            ["fit", "--train.precison", "float32"],
            "option: expected one of this command; got '--train.precison'; did you mean "
            "--train.precision?",
        ),
        (
            ["evalute", "runs/tiny"],
            "generate, inspect, report, sweep; got 'evalute'; did you mean evaluate?",
        ),
        (["sweep", "--target-cost", "little"], "target_cost: expected a number; got 'little'"),
        (["bench", "--lengths", "long"], "lengths: expected an integer; got 'long'"),
        (["generate"], "run and prompt: expected a value; got none"),
        (["fit", "--steps", "0"], "train.steps: expected at least 1"),
        (["fit", "--model.experts", "[full,magic]"], "expert: expected one of"),
        (["fit", "--model.d_model", "130"], "model.d_model: expected a multiple"),
        (["fit", "--model.window", "0"], "model.window: expected at least 1"),
        (["fit", "--prior.cost_ratio", "[0,0,0]"], "cost_ratio: expected not all zero"),
        (["fit", "--prior.cost_ratio", "[1,2,0.3]"], "cost_ratio: expected numbers in (0, 1]"),
        (
            ["fit", "--prior.total_concentration", "0"],
            "prior.total_concentration: expected a positive number",
        ),
        (["fit", "--config", "/nowhere.toml"], "/nowhere.toml does not exist"),
        (["fit", "--resume", "--out", "/nowhere"], "/nowhere does not exist"),
        (["fit", "--colour", "blue"], "option: expected one of this command; got '--colour'; did"),
        (["fit", "--nosuch", "1"], "got '--nosuch'; did you mean --out?; --help lists them"),
        (["evaluate", "x", "--by", "risk"], "got '--by'; did you mean --"),
        (["fit", "more"], "arguments: expected no further one; got 'more'; --help lists them"),
        (["evaluate", "/nowhere"], "/nowhere does not exist"),
        (["generate", "/nowhere"], "prompt"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--prompt", "", "prompt: expected at least one character"),
        ("--temperature", "-1", "temperature: expected"),
        ("--top_p", "0", "top_p: expected"),
        ("--tokens", "0", "tokens: expected at least 1"),
    ],
)
def test_bad_generation(
    finished_run: Path, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"--prompt": "x", "--tokens": "3", option: value}
    assert (
        main(
            ["generate", str(finished_run), *(word for pair in arguments.items() for word in pair)]
        )
        == 2
    )
    assert message in capsys.readouterr().err


def test_evaluate_on_another_vocabulary_is_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(finished_run, run_folder)
    assert main(["evaluate", str(run_folder), "--corpus", "recall"]) == 2
    assert "expected" in capsys.readouterr().err
