"""What a step owes to its number.

Draws and batches of its own, a gradient of at most the norm that the settings say; and
what of it is kept: a row of the metrics, a state that is whole before the weights are."""

from pathlib import Path

import pytest
import torch

from bayes_router.config import Config
from bayes_router.data.load import load_data
from bayes_router.data.tokens import Batch
from bayes_router.files import STATE, WEIGHTS
from bayes_router.training import checkpoint
from bayes_router.training.metrics import MetricsLog
from bayes_router.training.optimise import clip_gradient
from bayes_router.training.trainer import Trainer
from bayes_router.transformer import saving
from tests.tiny import fit_config, tiny_model


def trainer_of(config: Config) -> Trainer:
    config, data = load_data(config)
    return Trainer(config, data, torch.device("cpu"))


@pytest.mark.parametrize("draws", ["batch", "row"])
def test_every_step_draws_anew_and_a_step_repeated_draws_the_same(
    corpus: str, draws: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one batch, at weights that do not move: losses differ by the draws alone."""
    trainer = trainer_of(
        fit_config(corpus, draws=draws, lr=1e-30, controller_lr=1e-30, weight_decay=0.0)
    )
    tokens, targets = trainer.data.train.batch(0, 4, 32, 0)
    monkeypatch.setattr(trainer.data.train, "batch", lambda *_: Batch(tokens, targets))
    losses = [float(trainer.step(step)[0].nll) for step in (3, 4, 5, 3)]
    assert len(set(losses)) == 3 and losses[0] == losses[3]
    assert min(abs(losses[0] - losses[1]), abs(losses[1] - losses[2])) > 1e-5


def test_every_step_has_a_batch_of_its_own(corpus: str) -> None:
    trainer = trainer_of(fit_config(corpus))
    first, again, second = trainer._batch(0), trainer._batch(0), trainer._batch(1)
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, second.tokens)


def test_the_gradient_is_clipped_to_the_norm_of_the_settings(corpus: str) -> None:
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(clip_gradient(model, 0.25)) == pytest.approx(float(before.norm()), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(after, before * 0.25 / before.norm(), rtol=1e-4, atol=1e-9)

    trainer = trainer_of(fit_config(corpus, clip=1e-3))
    trainer.step(0)
    norm = torch.cat(
        [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    ).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_the_row_of_the_step_that_a_run_goes_on_from_is_kept(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 4, 6):
        log.add(step, {"nll": float(step)})
    log.write()
    assert [row["step"] for row in MetricsLog(tmp_path, 4).rows] == [1, 4]
    assert MetricsLog(tmp_path, 6).rows == log.rows and MetricsLog(tmp_path, 0).rows == []


def test_the_state_is_whole_before_the_weights_are_written(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two leaves a state to resume, and weights of a step before.

    Never the other way round.
    """
    trainer, written = trainer_of(fit_config(corpus)), []
    usual = checkpoint.write_whole

    def note(path: Path, write: object) -> None:
        usual(path, write)  # type: ignore[arg-type]
        written.append(path.name)

    for writer in (checkpoint, saving):
        monkeypatch.setattr(writer, "write_whole", note)
    progress = {"step": 1, "seconds": 0.0, **trainer.guard.state()}
    checkpoint.save_checkpoint(
        tmp_path, trainer.model, trainer.optimiser.state_dict(), progress, trainer.config
    )
    assert written == [STATE, WEIGHTS]
