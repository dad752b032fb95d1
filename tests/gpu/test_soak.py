"""Long runs on a GPU: its memory stays where it was."""

from pathlib import Path

import pytest
import torch

from bayes_router.config import with_changes
from bayes_router.training.fit import Trainer, load_data
from bayes_router.transformer.generate import stream
from tests.tiny import fit_config, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("graph", "steps"), [("off", 300), ("on", 2000)])
def test_training_takes_no_more_memory_in_the_end(tmp_path: Path, graph: str, steps: int) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} squared is {n * n}, and cubed {n**3}." for n in range(3000)))
    changes = {"schedule.anneal_from": 0.05, "schedule.anneal_to": 0.2}
    config, data = load_data(
        with_changes(fit_config(str(text), steps=steps, device="cuda", graph=graph), changes)
    )
    trainer = Trainer(config, data, torch.device("cuda"))
    for step in range(steps // 4):
        trainer.step(step)
    before = torch.cuda.memory_allocated()
    for step in range(steps // 4, steps):
        trainer.step(step)
    assert torch.cuda.memory_allocated() - before < 100_000


def test_twenty_thousand_generated_tokens_take_no_more_memory_than_the_first() -> None:
    model, made, before = tiny_model(num_layers=2).cuda(), 0, 0
    prompt = torch.zeros(40, 5, dtype=torch.int64, device="cuda")
    while made < 20_000:
        made += sum(len(new.tokens) for new in stream(model, prompt, 250))
        before = before or torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() - before < 100_000
