"""Losses and gradients that are not finite: skipped, counted, and in the end named."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bayes_router.config import load_config
from bayes_router.files import CONFIG, METRICS, STATE, SUMMARY, WEIGHTS
from bayes_router.routing.posterior import posterior
from bayes_router.training.checkpoint import load_run
from bayes_router.training.faults import find_culprit
from bayes_router.training.fit import Trainer, TrainingDiverged, fit
from tests.tiny import fit_config, tiny_batch, tiny_model


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / WEIGHTS)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The embedding's gradient is NaN at these steps."""
    usual = Trainer._gradient

    def gradient(self: Trainer, step: int, tokens: torch.Tensor, targets: torch.Tensor):  # type: ignore[no-untyped-def]
        loss, terms = usual(self, step, tokens, targets)
        if step in steps:
            self.model.network.embed.weight.grad[3] = torch.nan  # type: ignore[index]
        return loss, terms

    monkeypatch.setattr(Trainer, "_gradient", gradient)


def test_a_bad_step_is_skipped_and_counted(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {3, 4, 9})
    _, summary = fit(fit_config(corpus, max_skipped=2), tmp_path / "run", progress=False)
    assert summary["skipped_steps"] == 3
    metrics = pd.read_csv(tmp_path / "run" / METRICS)
    assert dict(zip(metrics["step"], metrics["skipped"], strict=True)) == {1: 0, 6: 2, 12: 3}
    assert all(bool(torch.isfinite(w).all()) for w in weights(tmp_path / "run").values())


def test_too_many_bad_steps_in_a_row_stop_with_the_culprit(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(5, 12)))
    run = tmp_path / "run"
    message = (
        "step 7: .*3 steps in a row were skipped; gradients that are not finite: "
        "network.embed.weight.*layer"
    )
    with pytest.raises(TrainingDiverged, match=message):
        fit(fit_config(corpus, max_skipped=2), run, progress=False)
    poison(monkeypatch, set())
    assert_finite_checkpoint(run, step=4)


def assert_finite_checkpoint(run: Path, step: int) -> None:
    state = torch.load(run / STATE, weights_only=True)
    assert state["progress"]["step"] == step
    assert all(bool(torch.isfinite(w).all()) for w in state["model"].values())


def test_the_count_in_a_row_survives_a_checkpoint(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(2, 12)))
    with pytest.raises(TrainingDiverged, match="step 7: .*6 steps in a row"):
        fit(fit_config(corpus, max_skipped=5), tmp_path / "run", progress=False)
    with pytest.raises(TrainingDiverged, match="step 7: .*6 steps in a row"):
        fit(fit_config(corpus, max_skipped=5), tmp_path / "run", resume=True, progress=False)


def explode(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Behind this step the weights are numbers, and their loss is none.

    What a learning rate of 1e9 makes of them.
    """
    usual = Trainer.step

    def step(self: Trainer, step: int):  # type: ignore[no-untyped-def]
        done = usual(self, step)
        if step == at:
            with torch.no_grad():
                self.model.network.blocks[0].attention.qkv.weight.fill_(1e30)  # type: ignore[union-attr]
        return done

    monkeypatch.setattr(Trainer, "step", step)


def test_weights_whose_loss_is_no_number_are_not_written_over_good_ones(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = (
        fit_config(corpus, checkpoint_every=2, max_skipped=3, eval_every=0),
        tmp_path / "run",
    )
    fit(config, tmp_path / "alone", progress=False)
    with monkeypatch.context() as patch:
        explode(patch, at=4)
        with (
            pytest.warns(
                RuntimeWarning,
                match=(
                    "step 6: the loss of these weights is no number; the checkpoint of step 4 "
                    "was kept"
                ),
            ),
            pytest.raises(
                TrainingDiverged,
                match="step 8: .*; the checkpoint of step 4 was kept: --resume goes on",
            ),
        ):
            fit(config, run, progress=False)
    assert_finite_checkpoint(run, step=4)
    _, summary = fit(config, run, resume=True, progress=False)
    assert summary["skipped_steps"] == 0
    alone = weights(tmp_path / "alone")
    assert all(torch.equal(w, alone[name]) for name, w in weights(run).items())


def test_a_run_that_ends_without_a_loss_keeps_its_last_good_checkpoint(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explode(monkeypatch, at=11)
    run = tmp_path / "run"
    with pytest.raises(
        TrainingDiverged,
        match="step 12: the loss on held-out text is no number; .*of step 8 was kept",
    ):
        fit(fit_config(corpus), run, progress=False)
    assert_finite_checkpoint(run, step=8)
    assert (
        all(bool(torch.isfinite(w).all()) for w in weights(run).values())
        and not (run / SUMMARY).exists()
    )


def diverged(corpus: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning):
        explode(patch, at=4)
        message = "was kept: --resume goes on from it, with a --train.lr below 0.003"
        with pytest.raises(TrainingDiverged, match=message):
            fit(fit_config(corpus, checkpoint_every=2, max_skipped=3), run, progress=False)


def test_a_run_that_diverged_goes_on_with_a_lower_learning_rate(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, slower = tmp_path / "run", {"checkpoint_every": 2, "max_skipped": 3, "lr": 1e-4}
    diverged(corpus, run, monkeypatch)
    with pytest.raises(
        ValueError, match=r"resume: .*lower learning rates; .*train.lr \(run 0.003, now 0.03\)"
    ):
        fit(fit_config(corpus, **{**slower, "lr": 0.03}), run, resume=True, progress=False)
    fit(fit_config(corpus, **slower), run, resume=True, progress=False)
    assert load_config(run / CONFIG).train.lr == 1e-4
    rates = dict(zip(*pd.read_csv(run / METRICS)[["step", "lr"]].to_numpy().T, strict=True))
    assert rates[1] > 1e-4 > rates[12]
    groups = torch.load(run / STATE, weights_only=True)["optimiser"]["param_groups"]
    assert [group["peak"] for group in groups] == [1e-4, 1e-4, 0.003]  # controllers have their own
    assert all(group["lr"] < group["peak"] for group in groups)
    load_run(run)  # the settings beside the weights are those of the file
    fit(fit_config(corpus, **slower), run, resume=True, progress=False)


def test_a_kill_while_a_learning_rate_is_lowered_leaves_what_can_be_resumed(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, slower = tmp_path / "run", {"checkpoint_every": 2, "max_skipped": 3, "lr": 1e-4}
    diverged(corpus, run, monkeypatch)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bayes_router.training.fit.write_text", killed)
        fit(fit_config(corpus, **slower), run, resume=True, progress=False)
    with pytest.raises(ValueError, match="train.lr is 0.003, was 0.0001; put back what it was"):
        fit(fit_config(corpus, checkpoint_every=2, max_skipped=3), run, resume=True, progress=False)
    fit(fit_config(corpus, **slower), run, resume=True, progress=False)
    assert load_config(run / CONFIG).train.lr == 1e-4


def test_looking_whether_a_checkpoint_is_sound_changes_no_step(corpus: str, tmp_path: Path) -> None:
    seldom, often = (tmp_path / name for name in ("seldom", "often"))
    for draws in ("batch", "row"):
        fit(
            fit_config(corpus, checkpoint_every=0, draws=draws),
            seldom,
            progress=False,
            overwrite=draws == "row",
        )
        fit(
            fit_config(corpus, checkpoint_every=1, draws=draws),
            often,
            progress=False,
            overwrite=draws == "row",
        )
        want = weights(seldom)
        assert all(torch.equal(w, want[name]) for name, w in weights(often).items())


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_moves_nothing_and_leaves_the_moments(fused: bool) -> None:
    """With the fused optimiser, which GPUs use, the decision is made on the device."""
    from bayes_router.training.faults import StepGuard

    model, alone = tiny_model(), tiny_model()
    kinds = [torch.optim.AdamW(m.parameters(), fused=fused) for m in (model, alone)]
    guards = [StepGuard(m, 5) for m in (model, alone)]
    for good in (True, False, True):
        for m, optimiser, guard in zip((model, alone), kinds, guards, strict=True):
            if m is alone and not good:
                continue
            for p in m.parameters():
                p.grad = torch.full_like(p, 0.1 if good else float("nan"))
            guard.step(optimiser, torch.tensor(good))
    assert int(guards[0].skipped) == 1 and int(guards[0].in_a_row) == 0
    for got, want in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_culprit_is_the_first_layer_that_breaks(layer: int) -> None:
    model, (tokens, _) = tiny_model(), tiny_batch()
    assert "widest range of concentrations is that of layer" in find_culprit(model, tokens)
    usual = model.controller.posterior

    def broken(index: int, hidden: torch.Tensor):  # type: ignore[no-untyped-def]
        q = usual(index, hidden)
        return posterior(torch.full_like(q.concentration, torch.inf), 0.1) if index == layer else q

    model.controller.posterior = broken  # type: ignore[method-assign]
    message = find_culprit(model, tokens)
    assert (
        f"layer {layer} is the first where its concentrations are not finite (concentration inf to "
        f"inf)" in message
    )
    model.controller.posterior = usual  # type: ignore[method-assign]
    with torch.no_grad():
        model.network.blocks[layer].attention.qkv.weight.fill_(torch.nan)  # type: ignore[union-attr]
    message = find_culprit(model, tokens)
    assert f"network.blocks.{layer}.attention.qkv.weight" in message
