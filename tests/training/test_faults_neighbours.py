"""Fits side by side do not touch each other; and what a fit says while it goes on."""

import sys
import threading
import warnings
from pathlib import Path

import pandas as pd
import pyro
import pytest
import torch
from safetensors.torch import load_file

from bayes_router.config import Config, with_changes
from bayes_router.files import METRICS, WEIGHTS
from bayes_router.training import checkpoint
from bayes_router.training.faults import sole_user
from bayes_router.training.fit import Trainer, fit, load_data
from bayes_router.transformer.network import RoutedTransformer
from tests.tiny import fit_config, tiny_model


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / WEIGHTS)


def assert_same_weights(got: Path, want: Path) -> None:
    a, b = weights(got), weights(want)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_two_fits_in_threads_do_not_touch_each_other(
    corpus: str, finished_run: Path, tmp_path: Path
) -> None:
    other = with_changes(fit_config(corpus, seed=3, steps=15), {"model.d_model": 32})
    fit(other, tmp_path / "other alone", progress=False)
    pyro.clear_param_store()
    jobs: dict[str, Config] = {"one": fit_config(corpus), "two": fit_config(corpus), "other": other}
    errors = []

    def work(name: str) -> None:
        try:
            fit(jobs[name], tmp_path / name, progress=False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_same_weights(tmp_path / "one", finished_run)
    assert_same_weights(tmp_path / "two", finished_run)
    assert_same_weights(tmp_path / "other", tmp_path / "other alone")
    assert len(pyro.get_param_store()) == 0


def test_a_folder_in_use_is_refused_to_others(
    corpus: str, finished_run: Path, tmp_path: Path
) -> None:
    fit(fit_config(corpus), tmp_path / "run", progress=False)
    with sole_user(tmp_path / "run"):
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(
                ValueError, match="out: expected a run folder that no other fit writes.*in use"
            ):
                fit(fit_config(corpus), tmp_path / "run", progress=False, **how)  # type: ignore[arg-type]
    assert_same_weights(tmp_path / "run", finished_run)


def test_two_models_share_no_parameter() -> None:
    one, two = tiny_model(0), tiny_model(0)
    held = {p.data_ptr() for p in one.parameters()}
    assert not held & {p.data_ptr() for p in two.parameters()}
    before = [p.detach().clone() for p in two.parameters()]
    with torch.no_grad():
        for p in one.parameters():
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, two.parameters(), strict=True))


def test_one_line_an_evaluation_without_a_terminal(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(fit_config(corpus), tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 6/12", "step 12/12"]
    assert all("nll" in line and "hard" in line and "cost" in line for line in lines)


def test_tensorboard_has_the_metrics(corpus: str, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        fit(fit_config(corpus, tensorboard=True), tmp_path / "run", progress=False)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    metrics = pd.read_csv(tmp_path / "run" / METRICS)
    assert [event.step for event in events.Scalars("nll")] == list(metrics["step"])
    assert [event.value for event in events.Scalars("nll")] == pytest.approx(list(metrics["nll"]))
    assert "valid_nll_hard" in events.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_names_the_extra(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError,
        match=r"train.tensorboard: expected the package.*pip install -e '.\[tensorboard\]'",
    ):
        fit(fit_config(corpus, tensorboard=True), tmp_path / "run", progress=False)


def test_the_network_is_as_before_after_a_fit(corpus: str, tmp_path: Path) -> None:
    model, _ = fit(fit_config(corpus, recompute=True), tmp_path / "run", progress=False)
    assert isinstance(model.network, RoutedTransformer)
    assert all("mlp" not in vars(block) for block in model.network.blocks)
    config, data = load_data(fit_config(corpus))
    assert checkpoint.load_checkpoint(
        tmp_path / "run", model, Trainer(config, data, torch.device("cpu")).optimiser, 12
    )
