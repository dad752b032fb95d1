"""A training step replayed from a CUDA graph is the step without one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_router.config import with_changes
from bayes_router.data.load import load_data
from bayes_router.training.graph import GraphedGradient
from bayes_router.training.trainer import Trainer
from bayes_router.types import LossTerms
from tests.tiny import fit_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(f"{n} squared is {n * n}, and cubed {n**3}." for n in range(3000)))
    return str(path)


def trainer(corpus: str, **changes: object) -> Trainer:
    annealed = {
        "schedule.start_experts": ("full",),
        "schedule.anneal_from": 0.3,
        "schedule.straight_through_from": 0.7,
    }
    settings = with_changes(fit_config(corpus, steps=STEPS, device="cuda"), {**annealed, **changes})
    config, data = load_data(settings)
    return Trainer(config, data, torch.device("cuda"))


@pytest.mark.parametrize(
    "changes", [{}, {"train.precision": "bfloat16"}, {"train.recompute": True}]
)
def test_replayed_steps_are_eager_steps(corpus: str, changes: dict[str, object]) -> None:
    """The prior moves between the steps, its price appears, straight-through sets in.

    Each reaches the graph.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        eager, graphed = (
            trainer(corpus, **changes, **{"train.graph": graph}) for graph in ("off", "on")
        )
        for step in range(STEPS):
            want, got = eager.step(step)[0], graphed.step(step)[0]
            torch.testing.assert_close(
                torch.stack(got), torch.stack(want), rtol=2e-4, atol=1e-5, msg=f"step {step}"
            )
    finally:
        torch.use_deterministic_algorithms(False)
    # without a price, with one, straight through
    assert graphed.graphed is not None and len(graphed.graphed._captured) == 3


def test_graphs_of_several_shapes_share_memory_and_replay_by_turns() -> None:
    device = torch.device("cuda")
    model = torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 50)).to(device)

    def gradient(tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach(), LossTerms(loss.detach(), loss.detach(), loss.detach()), loss.detach()

    graphed = GraphedGradient(gradient, model)
    for step in range(9):
        length = (7, 64, 21)[step % 3]
        tokens, targets = torch.randint(50, (2, 2, length), device=device)
        model.zero_grad(set_to_none=True)
        want, *_ = gradient(tokens, targets)
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        got, *_ = graphed(tokens, targets, step, None)
        torch.testing.assert_close(got, want)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    assert len(graphed._captured) == 3


def test_a_step_does_not_wait_for_the_device(corpus: str) -> None:
    graphed = trainer(corpus, **{"train.graph": "on"})
    for step in range(2):
        graphed.step(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
