"""A fit: deterministic, resumable bit for bit, honest about divergence, and it learns."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bayes_router.config import load_config, with_changes
from bayes_router.training import fit as fit_module
from bayes_router.training.checkpoint import load_run
from bayes_router.training.fit import Trainer, TrainingDiverged, fit, load_data
from bayes_router.training.optimise import build_optimiser, set_learning_rate
from tests.tiny import fit_config, tiny_model

FILES = {
    "config.toml",
    "config.json",
    "metrics.csv",
    "summary.json",
    "evidence.safetensors",
    "fitted_text.safetensors",
    "model.safetensors",
    "state.pt",
}
SUMMARY = {
    "corpus",
    "seed",
    "steps",
    "tokens_seen",
    "nll",
    "elbo",
    "kl_per_layer",
    "load_per_layer",
    "executed_cost",
    "route_information_per_layer",
    "parameters",
    "seconds",
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_run_folder_holds_what_it_should(finished_run: Path) -> None:
    assert {path.name for path in finished_run.iterdir()} - {"figures"} == FILES
    summary = json.loads((finished_run / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert set(summary["corpus"]) == {"name", "sha256", "tokens"}
    assert set(summary["nll"]) == {"mean", "sample", "hard"}
    assert set(summary["executed_cost"]) == {"paper", "flops"}
    assert summary["tokens_seen"] == 12 * 4 * 32
    for shares in summary["load_per_layer"]:
        assert sum(shares) == pytest.approx(1.0)
    metrics = pd.read_csv(finished_run / "metrics.csv")
    assert list(metrics["step"]) == [1, 6, 12]
    torch.testing.assert_close(
        torch.tensor(metrics["elbo"].to_numpy()),
        torch.tensor(-(metrics["nll"] + metrics["kl"]).to_numpy()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_two_fits_of_one_seed_are_identical_and_of_two_seeds_not(
    corpus: str, finished_run: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)  # the state of the caller's generator must not matter
    before = torch.random.get_rng_state()
    fit(fit_config(corpus), tmp_path / "again", progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    fit(fit_config(corpus, seed=1), tmp_path / "other", progress=False)
    assert same(weights(finished_run), weights(tmp_path / "again"))
    assert not same(weights(finished_run), weights(tmp_path / "other"))


@pytest.mark.parametrize(("stop", "draws"), [(4, "batch"), (8, "batch"), (8, "row")])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    corpus: str,
    finished_run: Path,
    tmp_path: Path,
    stop: int,
    draws: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, config, whole = Trainer.step, fit_config(corpus, draws=draws), finished_run
    if draws != "batch":
        whole = tmp_path / "whole"
        fit(config, whole, progress=False)

    def fail(self: Trainer, step: int):  # type: ignore[no-untyped-def]
        if step == stop + 1:
            raise KeyboardInterrupt
        return usual(self, step)

    monkeypatch.setattr(Trainer, "step", fail)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(config, run, progress=False)
    monkeypatch.setattr(Trainer, "step", usual)
    torch.rand(7)
    fit(config, run, resume=True, progress=False)
    assert same(weights(whole), weights(run))
    columns = ["step", "nll", "kl", "valid_nll_hard"]
    got, want = (pd.read_csv(r / "metrics.csv")[columns] for r in (run, whole))
    pd.testing.assert_frame_equal(got, want)


def test_it_learns(corpus: str, tmp_path: Path) -> None:
    _, summary = fit(
        fit_config(corpus, steps=60, warmup=5, lr=1e-2), tmp_path / "run", progress=False
    )
    assert summary["nll"]["hard"] < 3.6  # uniform over bytes is 5.55
    assert abs(summary["nll"]["hard"] - summary["nll"]["mean"]) < 0.2


def test_the_loaded_model_is_the_fitted_one(corpus: str, tmp_path: Path) -> None:
    model, _ = fit(fit_config(corpus), tmp_path / "run", progress=False)
    config, loaded = load_run(tmp_path / "run")
    assert config == load_config(tmp_path / "run" / "config.toml")
    tokens = torch.randint(256, (2, 20))
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, loaded(tokens).logits)


def test_the_recall_task_is_a_corpus(tmp_path: Path) -> None:
    config = with_changes(fit_config("unused"), {"data.corpus": "recall", "data.context": 128})
    model, summary = fit(config, tmp_path / "run", progress=False)
    assert summary["corpus"]["name"] == "recall"
    assert model.config.vocab_size == load_data(config)[1].train.vocab_size


def test_divergence_stops_with_the_step_and_keeps_the_last_checkpoint(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "LOG_EVERY", 1)
    usual = Trainer.step

    def poison(self: Trainer, step: int):  # type: ignore[no-untyped-def]
        if step == 6:
            with torch.no_grad():
                self.model.network.embed.weight[0] = torch.nan
                self.model.network.embed.weight[1:] = torch.nan
        return usual(self, step)

    monkeypatch.setattr(Trainer, "step", poison)
    run = tmp_path / "run"
    with pytest.raises(
        TrainingDiverged, match="step 6: loss nan.*the checkpoint of step 4 was kept"
    ):
        fit(fit_config(corpus), run, progress=False)
    assert all(bool(torch.isfinite(w).all()) for w in weights(run).values())
    monkeypatch.setattr(Trainer, "step", usual)
    fit(fit_config(corpus), run, resume=True, progress=False)


def test_the_optimiser_holds_every_parameter_once_and_decays_matrices_alone() -> None:
    model, config = tiny_model(), fit_config("x").train
    groups = build_optimiser(model, config).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for p in groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names and all(
        "norm" not in name and "embed" not in name and "controller" not in name for name in names
    )


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = fit_config("x", steps=100, warmup=10, lr=1.0, lr_floor=0.1).train
    optimiser = build_optimiser(tiny_model(), config)
    rates = [set_learning_rate(optimiser, config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


# What is refused, and that nothing is written or lost then


def test_an_existing_run_is_not_overwritten_unasked(
    corpus: str, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    with pytest.raises(ValueError, match="out: expected a new folder.*--overwrite or --resume"):
        fit(fit_config(corpus), run, progress=False)
    assert same(weights(run), weights(finished_run))
    fit(fit_config(corpus, seed=1), run, overwrite=True, progress=False)
    assert not same(weights(run), weights(finished_run))


def test_a_folder_that_is_no_run_is_never_removed(corpus: str, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    with pytest.raises(ValueError, match="out: expected a run folder to overwrite"):
        fit(fit_config(corpus), tmp_path, overwrite=True, progress=False)
    assert precious.read_text() == "years of work"


def test_resuming_with_other_settings_names_them(
    corpus: str, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    with pytest.raises(ValueError, match=r"resume: .*train.lr \(run 0.003, now 0.5\)"):
        fit(fit_config(corpus, lr=0.5), run, resume=True, progress=False)
    assert same(weights(run), weights(finished_run))


@pytest.mark.parametrize("missing", ["config.toml", "state.pt"])
def test_resuming_an_incomplete_run_names_the_file(
    corpus: str, finished_run: Path, tmp_path: Path, missing: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / missing).unlink()
    with pytest.raises(ValueError, match=f"expected {missing} in"):
        fit(fit_config(corpus), run, resume=True, progress=False)


@pytest.mark.parametrize(("name", "load"), [("state.pt", "resume"), ("model.safetensors", "load")])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_run_names_the_file(
    corpus: str, finished_run: Path, tmp_path: Path, name: str, load: str, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    content = (run / name).read_bytes()
    (run / name).write_bytes(
        {"truncated": content[: len(content) // 2], "garbage": b"\x07" * 5000, "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match=f"{name}: expected .* damaged"):
        if load == "resume":
            fit(fit_config(corpus), run, resume=True, progress=False)
        else:
            load_run(run)


def test_a_checkpoint_of_another_model_is_refused(
    corpus: str, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    text = (run / "config.toml").read_text().replace("d_model = 16", "d_model = 32")
    (run / "config.toml").write_text(text)
    with pytest.raises(
        ValueError,
        match="config.toml: expected the settings .*; model.d_model is 32, was 16; put back",
    ):
        load_run(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.corpus": "text:/nowhere"}, "no such path"),
        ({"data.context": 10_000_000}, "context: expected"),
        ({"train.device": "warp"}, "train.device: expected auto, cpu or a device"),
        ({"data.corpus": "recall"}, "data.context: expected at least"),
        ({"model.experts": ("full", "magic")}, "expert: expected one of"),
        ({"data.tokeniser": "runes"}, "tokeniser: expected one of"),
    ],
)
def test_bad_settings_leave_no_folder(
    corpus: str, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(with_changes(fit_config(corpus), changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_no_temporary_file_is_left(finished_run: Path) -> None:
    assert not [path for path in finished_run.rglob("*") if path.suffix == ".tmp"]


def test_a_graph_is_refused_where_it_cannot_be_captured(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.graph: expected auto or off.*got 'device cpu'"):
        fit(fit_config(corpus, graph="on"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_objective_moves_inside_the_same_tensors(corpus: str) -> None:
    """What a CUDA graph has captured must see every later step of the schedule."""
    config, data = load_data(
        with_changes(fit_config(corpus), {"schedule.start_experts": ("full",)})
    )
    trainer = Trainer(config, data, torch.device("cpu"))
    program, scale = trainer.objective.model, trainer.objective.kl_scale  # type: ignore[attr-defined]
    trainer.objective.follow(trainer.schedule.at(5))
    names = ("concentration", "log_normaliser", "tilt")
    places = {name: getattr(program.prior, name).data_ptr() for name in names}
    before = {name: getattr(program.prior, name).clone() for name in names}
    trainer.objective.follow(trainer.schedule.at(11))
    assert {name: getattr(program.prior, name).data_ptr() for name in names} == places
    assert all(not torch.equal(getattr(program.prior, name), before[name]) for name in before)
    trainer.objective.follow(replace(trainer.schedule.at(11), kl_weight=0.5))
    assert (
        trainer.objective.kl_scale is scale and float(scale) == 0.5 == trainer.objective.kl_weight
    )  # type: ignore
