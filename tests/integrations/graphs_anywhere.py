"""What stands in for CUDA graphs on a CPU.

What is captured is kept as it was called, and called again into the same memory, which is all that
a graph does.
"""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from bayes_router.integrations.huggingface import graphs as engine
from bayes_router.integrations.huggingface import replay, replayable
from bayes_router.integrations.patch.passes import Pass


class Again:
    """In the place of a graph."""

    captured = replayed = 0

    def __init__(self, run: Callable[[], Any], found: Any):
        self.run, self.found = run, found

    def replay(self) -> None:
        Again.replayed += 1
        for old, new in zip(*(tensors(x) for x in (self.found, self.run())), strict=True):
            old.copy_(new)


def tensors(found: Any) -> list[Tensor]:
    """What a pass leaves: its hidden states, how it was routed, and keys that go to no store."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Pass):
        return [*found.concentration.values(), *found.executed.values()]
    return [x for part in found for x in tensors(part)]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture wherever the model is."""

    def capture(self: Any, run: Callable[[], Any], back: Any = lambda: None) -> Any:
        Again.captured += 1
        run()
        back()
        found = run()
        back()
        return Again(run, found), found

    Again.captured = Again.replayed = 0
    monkeypatch.setattr(engine, "require_cuda", lambda model: None)
    monkeypatch.setattr(replay, "require_cuda", lambda model: None)
    monkeypatch.setattr(replayable, "on_device", lambda tokens: True)
    monkeypatch.setattr(engine.Graphs, "_capture", capture)
