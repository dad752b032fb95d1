"""A model end to end at toy size: both ways are timed on the same tokens, and decoding forgets what it read."""

from pathlib import Path

import pytest
import torch

from analysis.speed_model import load
from bayes_router.benchmark import memory, model
from bayes_router.benchmark.model import Decoder, measure, note_on_context


def test_rows_of_a_fitted_run(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measurable", lambda device: False)  # a process for each variant takes seconds
    monkeypatch.setattr(model, "BATCHES", (2,))
    monkeypatch.setattr(model, "SECONDS", 0.0)
    subject = load(str(finished_run), torch.device("cpu"))
    rows = list(measure(subject, [40]))
    names = ["routed", "force full", "full"]
    assert [(row["what"], row["variant"]) for row in rows] == [(what, n) for what in ("prefill", "decode") for n in names]
    for row in rows:
        assert row["ms"] > 0 and row["tokens_per_s"] == pytest.approx(
            1e3 * (40 if row["what"] == "prefill" else 2 * model.STEPS) / row["ms"]
        )
        rivals = [other["ms"] for other in rows if other["what"] == row["what"] and "full" in other["variant"]]
        assert row["speedup"] == pytest.approx(min(rivals) / row["ms"])
        if row["variant"] == "routed":
            assert sum(row[f"load_{name}"] for name in subject.config.model.experts) == pytest.approx(1)
            assert 0 < row["cost_paper"] <= 1
    context = subject.config.data.context
    assert not note_on_context(subject, [context])
    assert f"made for {context} tokens: at {2 * context}" in note_on_context(subject, [context, 2 * context])


@torch.no_grad()
@pytest.mark.parametrize("way", [None, "full", "alone"])
def test_a_turn_reads_the_same_tokens_again(finished_run: Path, way: str | None) -> None:
    subject = load(str(finished_run), torch.device("cpu"))
    text = subject.tokens(2, 30)
    decoder = Decoder(subject.model, text[:, :26], text[:, 26:], way)
    seen = []
    decoder.run = lambda: seen.append(decoder.step())
    decoder.turn(torch.device("cpu"))
    decoder.turn(torch.device("cpu"))
    torch.testing.assert_close(torch.cat(seen[:4]), torch.cat(seen[4:]), rtol=0, atol=0)
    force = None if way is None else "full"
    whole = subject.model(text, force=force).logits[:, 26:]
    torch.testing.assert_close(torch.cat(seen[:4], 1), whole, rtol=1e-3, atol=1e-3)
