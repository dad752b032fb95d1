"""`sweep` prints settings that `fit --config` reads and that cost what was asked.

`evaluate` meets a budget.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from bayes_router.cli import main
from bayes_router.config import load_config
from bayes_router.data.load import load_data
from bayes_router.routing.policy import Budget
from bayes_router.training.checkpoint import bound_settings, load_run
from bayes_router.training.fit import fit
from bayes_router.transformer.build import build_prior
from bayes_router.transformer.saving import save_weights
from tests.tiny import fit_config


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose controllers route every token another way, on text without frequent characters.

    No jump is large.
    """
    folder, generator = Path(tmp_path_factory.mktemp("commands")), torch.Generator().manual_seed(0)
    text = folder / "text"
    text.mkdir()
    for i in range(10):
        (text / f"{i}.txt").write_bytes(
            bytes(torch.randint(33, 127, (600,), generator=generator).tolist())
        )
    run = folder / "run"
    config = fit_config(str(text), steps=2)
    heads = replace(config.model, num_heads=4, num_kv_heads=2, route_by="head")
    fit(replace(config, model=heads), run, progress=False)
    _, model = load_run(run)
    for controller in model.controller.layers:
        torch.nn.init.normal_(controller.out.weight, std=1.5, generator=generator)  # type: ignore[union-attr, arg-type]
    save_weights(run, model, bound_settings(load_config(run / "config.toml")))
    return run


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_the_name_of_before_is_served_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--target-cost", "0.25", "--samples", "100"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("bayes-router: `calibrate` is called `sweep` now\n")
    assert main(["sweep", "--target-cost", "0.25", "--samples", "100"]) == 0
    assert capsys.readouterr().out == said.out


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--target-entropy", 0.3],
        ["--price", 2.0, "--total-concentration", 1.5],
        ["--cost", "flops", "--context", 1024],
        ["--map", "inverse"],
    ],
)
def test_printed_settings_are_a_config_that_costs_the_target(
    extra: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "solved"
    assert run("sweep", "--target-cost", 0.24, "--samples", 2000, "--out", out, *extra) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    config = load_config(printed)
    assert config == load_config(out / "prior.toml")
    prior = build_prior(config.prior, config.model, 4, config.data.context)
    predictive = prior.prior_predictive()
    assert predictive.cost == pytest.approx(0.24, abs=1e-4)
    if "--target-entropy" in extra:
        assert predictive.expected_entropy == pytest.approx(0.3, abs=1e-4)
    assert (out / "prior.png").stat().st_size > 10_000
    text = printed.read_text()
    assert "prior predictive: cost 0.2400" in text and "95%" in text


def test_with_a_run_it_sweeps_and_draws(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "swept"
    arguments = (
        "sweep",
        run_folder,
        "--steps",
        1,
        "--seeds",
        1,
        "--tokens",
        64,
        "--device",
        "cpu",
        "--out",
        out,
    )
    assert run(*arguments) == 0
    frame = pd.read_csv(out / "sweep.csv")
    assert len(frame) == 11  # the run's settings, and 3 + 3 + 4 moved one at a time
    assert {path.name for path in out.iterdir()} == {
        "prior.toml",
        "prior.png",
        "sweep.csv",
        "sweep.png",
    }
    text = capsys.readouterr().out
    assert "posterior after 1 steps of controllers" in text and "route_information" in text
    assert (
        load_config(out / "prior.toml").prior.temperature
        == load_config(run_folder / "config.toml").prior.temperature
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "target_cost: expected a cost to solve for, or a run to sweep"),
        (["--target-cost", 0.05], "from 0.151"),
        (["--target-cost", 0.25, "--price", 10], "lower the price"),
        (["--target-cost", 0.25, "--price", -1], "price: expected 0 or more"),
        (["--target-cost", 0.25, "--cost", "time"], "flops, latency, paper"),
        (["--target-cost", 0.25, "--map", "cubic"], "boltzmann, inverse, uniform"),
        (["--target-cost", 0.25, "--cost", "flops", "--context", 16], "take a longer context"),
        (["--target-cost", 0.25, "--samples", 0], "samples: expected at least 1"),
        (["nowhere"], "does not exist"),
    ],
)
def test_wrong_input_ends_in_one_line(
    arguments: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_settings_of_a_solution_need_a_target(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", run_folder, "--price", 1.0) == 2
    assert "a target_cost beside it" in capsys.readouterr().err


@pytest.mark.parametrize("policy", [[], ["--policy", "conservative", "--threshold", 0.8]])
def test_evaluate_meets_a_budget(
    policy: list[object], run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluated"
    assert (
        run("evaluate", run_folder, "--budget", 0.6, "--curve-tokens", 256, "--out", out, *policy)
        == 0
    )
    text = capsys.readouterr().out
    assert "held-out nll against budget (paper, full = 1), 256 tokens" in text
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["executed_cost"]["paper"] == pytest.approx(0.6, abs=0.005)
    assert figures["policy"] == (policy[1] if policy else "argmax")
    curve = pd.read_csv(out / "dial.csv")
    assert curve["budget"].min() == 0.16 and curve["budget"].max() == 1.0
    assert (curve["cost"] - curve["budget"])[curve["met"]].abs().max() <= 0.005


def test_a_budget_in_bytes_is_what_key_heads_read(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoding step at 32 tokens reads all keys, the window of 8, or none, by two key heads."""
    arguments = ["--budget", 0.6, "--cost", "bytes", "--tokens", 256, "--curve-tokens", 32]
    assert run("evaluate", run_folder, *arguments) == 0
    text = capsys.readouterr().out
    found = re.search(r"budget 0.6 \(bytes\), .*price ([-.\d]+) .*executed cost ([.\d]+)", text)
    assert found and "nll against budget (bytes, full = 1)" in text
    config, model = load_run(run_folder)
    reads = {"full": 1.0, "local": 8 / 32, "gated": 0.0}
    costs = tuple(reads[name] for name in config.model.experts)
    model.policy = Budget(costs, float(found[1]))
    paid = []
    with torch.no_grad():
        for batch in load_data(config)[1].valid.windows(32, 4, 256):
            read = torch.tensor(costs)[model(batch.tokens).route].unflatten(-1, (2, 2))
            paid.append(torch.stack([read.amax(-1).mean(), read.mean()]))
    by_key_head, by_head = torch.stack(paid).mean(0).tolist()
    # the price is printed to four digits
    assert by_key_head == pytest.approx(float(found[2]), abs=2e-3) and by_head < by_key_head - 0.1
    assert float(found[2]) == pytest.approx(0.6, abs=0.005)
    assert run("evaluate", run_folder, "--cost", "euros") == 2
    assert "one of bytes, flops, latency, paper; got 'euros'" in capsys.readouterr().err


def test_evaluate_by_flops_and_its_refusals(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", run_folder, "--budget", 0.01, "--cost", "flops") == 2
    assert "budget: expected a cost from" in capsys.readouterr().err
    assert run("evaluate", run_folder, "--threshold", 0.5) == 2
    assert "--policy conservative" in capsys.readouterr().err
    assert run("evaluate", run_folder, "--policy", "greedy") == 2
    assert "one of argmax, budget, conservative, guard; got 'greedy'" in capsys.readouterr().err
