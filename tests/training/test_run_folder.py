"""A run folder whose files do not fit each other, or hold no numbers.

One line that names what, and the way out.
"""

import io
import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bayes_router import __version__
from bayes_router.cli import main
from bayes_router.files import CONFIG, METRICS, STATE, WEIGHTS
from bayes_router.training.checkpoint import (
    DIGEST_BYTES,
    bound_settings,
    load_run,
)
from bayes_router.training.fit import fit
from bayes_router.transformer import saving
from bayes_router.transformer.saving import save_weights, weights_digest
from tests.tiny import fit_config


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def one_line(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("setting", "then", "now"),
    [
        ("model.window", "8", "12"),
        ("prior.price", "10.0", "0.5"),
        ("schedule.kl_weight", "0.003", "0.007"),
        ("model.mlp_ratio", "4.0", "2.0"),
    ],
)
def test_a_changed_setting_is_named(
    run: Path, setting: str, then: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, name = run / CONFIG, setting.split(".")[1]
    text = path.read_text()
    assert f"{name} = {then}\n" in text
    path.write_text(text.replace(f"{name} = {then}\n", f"{name} = {now}\n"))
    said = (
        f"{path}: expected the settings that the weights were made with; {setting} is {now}, "
        f"was {then}; put back"
    )
    for command in (
        ["evaluate", run],
        ["generate", run, "--prompt", "x"],
        ["fit", "--resume", "--out", run],
    ):
        assert said in one_line([*command, "--device", "cpu"], capsys), command


def test_every_bit_of_the_settings_counts(run: Path) -> None:
    """Each flip of a bit is found, or changes nothing that is read.

    It is another setting, or no TOML, and is named.
    """
    whole, settings = (run / CONFIG).read_bytes(), load_run(run)[0]
    for place in range(0, len(whole), 23):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 7)
        (run / CONFIG).write_bytes(bytes(flipped))
        try:
            config, _ = load_run(run)
        except ValueError as error:
            assert CONFIG in str(error) and "\n" not in str(error)
        else:
            assert config == settings or {config.data.corpus, config.train.device} != {
                settings.data.corpus,
                settings.train.device,
            }


def test_where_text_lies_and_what_computes_may_change(
    run: Path, tmp_path: Path, corpus: str
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(
        text.replace(corpus, str(moved)).replace('device = "cpu"', 'device = "auto"')
    )
    config, _ = load_run(run)
    assert config.data.corpus == f"text:{moved}" and config.train.device == "auto"
    # the same fit elsewhere writes the same bytes
    assert str(corpus) not in (run / WEIGHTS).read_bytes().decode("latin-1")


def test_runs_of_before_have_no_settings_in_their_weights(
    run: Path, finished_run: Path, corpus: str
) -> None:
    weights = load_file(run / WEIGHTS)
    save_file(weights, run / WEIGHTS, {"sha256": weights_digest(weights)})
    _, model = load_run(run)
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    payload = (run / STATE).read_bytes()[:-DIGEST_BYTES]
    state = torch.load(io.BytesIO(payload), weights_only=True)
    del state["settings"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (run / STATE).write_bytes(buffer.getvalue() + sha256(buffer.getvalue()).digest())
    (run / WEIGHTS).unlink()
    fit(fit_config(corpus), run, resume=True, progress=False)
    assert (run / WEIGHTS).is_file() and (run / METRICS).read_text() == (
        finished_run / METRICS
    ).read_text()


def test_a_run_of_another_version_names_both(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a later version may bring.

    A setting that this one does not know, or weights under other names.
    """
    config, model = load_run(run)
    with monkeypatch.context() as later:
        later.setattr(saving, "__version__", "9.9.0")
        save_weights(run, model, bound_settings(config))
    assert load_run(run)[0] == config  # nothing is wrong with it
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(text.replace("[model]\n", "[model]\nwarp_drive = 3\n"))
    error = one_line(["evaluate", run, "--device", "cpu"], capsys)
    assert "model.*: expected one of" in error and error.endswith(
        f"bayes-router 9.9.0 wrote this run, this is {__version__}\n"
    )
    (run / CONFIG).write_text(text)
    weights = {name.replace("embed", "lookup"): w for name, w in model.state_dict().items()}
    table = {
        "sha256": weights_digest(weights, bound_settings(config) + "9.9.0"),
        "settings": bound_settings(config),
    }
    save_file(weights, run / WEIGHTS, {"run": json.dumps(table | {"version": "9.9.0"})})
    error = one_line(["evaluate", run, "--device", "cpu"], capsys)
    assert (
        "names: expected those of the model" in error
        and "bayes-router 9.9.0 wrote this run" in error
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(
    run: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model = load_run(run)
    name = "network.blocks.1.attention.qkv.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name][0, 0] = value
    save_weights(run, model, bound_settings(config))
    for command in (
        ["evaluate", run],
        ["generate", run, "--prompt", "x"],
        ["inspect", run],
        ["report", run],
    ):
        error = one_line([*command, "--device", "cpu"], capsys)
        assert (
            f"{run / WEIGHTS}: " in error
            and f"{name}: expected numbers; got 'NaN or infinity'" in error
        )
    payload = (run / STATE).read_bytes()[:-DIGEST_BYTES]
    state = torch.load(io.BytesIO(payload), weights_only=True)
    state["model"][name][0, 0] = value
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (run / STATE).write_bytes(buffer.getvalue() + sha256(buffer.getvalue()).digest())
    error = one_line(["fit", "--resume", "--out", run, "--quiet"], capsys)
    assert f"{run / STATE}: " in error and f"{name}: expected numbers" in error


def test_a_number_that_float32_does_not_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lr", "controller_lr", "weight_decay"):
        error = one_line(["fit", "--out", tmp_path / "run", f"--train.{name}", "1e300"], capsys)
        assert f"train.{name}: expected finite numbers, of at most 3.4e+38; got 1e+300" in error
    assert not (tmp_path / "run").exists()
