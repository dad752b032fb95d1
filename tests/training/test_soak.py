"""Long runs: memory stays where it was, and nothing piles up in Pyro or in a cache."""

import gc

import psutil
import pyro
import pytest
import torch

from bayes_router.config import with_changes
from bayes_router.training.fit import Trainer, load_data
from bayes_router.transformer.generate import stream
from tests.tiny import fit_config, tiny_model


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def soak(corpus: str, steps: int) -> tuple[int, int]:
    """Growth of memory in bytes, and of the number of tensors, in a long fit.

    After a quarter of `steps` steps, when the prior is annealed.
    """
    config = with_changes(
        fit_config(corpus, steps=steps, batch_size=2),
        {"schedule.anneal_from": 0.05, "schedule.anneal_to": 0.2},
    )
    trainer = Trainer(*load_data(config), torch.device("cpu"))
    warm, store = steps // 4, len(pyro.get_param_store())
    for step in range(warm):
        trainer.step(step)
    memory, count = resident(), tensors()
    for step in range(warm, steps):
        trainer.step(step)
    assert len(pyro.get_param_store()) == store
    assert not pyro.poutine.runtime.am_i_wrapped()
    return resident() - memory, tensors() - count


@pytest.mark.slow
def test_a_thousand_steps_take_no_more_memory_than_a_quarter_of_them(corpus: str) -> None:
    growth, count = soak(corpus, 1000)
    assert growth < 10_000_000
    assert abs(count) <= 2


def generate(tokens: int, batch: int) -> int:
    """Growth of memory in bytes while texts of 250 tokens are generated, after the first one."""
    model = tiny_model(num_layers=2)
    prompt = torch.zeros(batch, 5, dtype=torch.int64)
    made, memory = 0, 0
    while made < tokens:
        for new in stream(model, prompt, 250):
            made += len(new.tokens)
        memory = memory or resident()
    return resident() - memory


def test_eight_thousand_tokens_take_no_more_memory_than_a_thousand() -> None:
    assert generate(8_000, batch=4) < 5_000_000
