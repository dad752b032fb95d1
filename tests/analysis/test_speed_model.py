"""A model end to end at toy size.

Both ways are timed on the same tokens, and decoding forgets what it read.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.speed import speed_model
from analysis.speed.speed_model import load
from bayes_router.attention.cost import Mode, hard_flops
from bayes_router.attention.hard.backend import Backend
from bayes_router.attention.hard.dense import DENSE
from bayes_router.benchmark import memory, model, verify
from bayes_router.benchmark.cases import Shape
from bayes_router.benchmark.decoder import Decoder, lean_network
from bayes_router.benchmark.model import measure, note_on_context
from bayes_router.transformer.cost import model_cost


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # a process for each variant takes seconds
    monkeypatch.setattr(memory, "measurable", lambda device: False)
    monkeypatch.setattr(model, "BATCHES", {"cpu": (2,)})
    monkeypatch.setattr(model, "SECONDS", 0.0)


def command(run: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        "speed_model.py",
        str(run),
        "--device",
        "cpu",
        "--lengths",
        "40",
        "60",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    speed_model.main()


@pytest.mark.usefixtures("quick")
def test_the_command_prints_and_writes(
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        speed_model, "verify_model", lambda device, config: asked.append(config.experts)
    )
    command(finished_run, tmp_path, monkeypatch)
    assert asked == [("full", "gated", "local")]
    table = pd.read_csv(tmp_path / "speed_model_cpu.csv")
    assert set(table["T"]) == {40, 60} and table["trained_at"].eq(32).all()
    assert table["command"].str.startswith("python -m analysis.speed.speed_model").all()
    assert (tmp_path / "speed_model_cpu.png").stat().st_size > 1000
    assert "prefill routed, batch 1, 40 tokens: " in capsys.readouterr().out
    assert not (tmp_path / "speed_model_cpu.partial.csv").exists()


@pytest.mark.usefixtures("quick")
def test_nothing_is_printed_while_a_backend_is_wrong(
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = verify.routed_attention

    def wrong(*inputs: object, backend: Backend | str, **options: object) -> torch.Tensor:
        out = right(*inputs, backend=backend, **options)  # type: ignore[arg-type]
        return out * 1.01 if backend is DENSE else out

    monkeypatch.setattr(verify, "CASES", (verify.Case(Shape(1, 2, 100, 16), 1),))
    monkeypatch.setattr(verify, "routed_attention", wrong)
    with pytest.raises(
        ValueError, match="dense on cpu: out is off by 1.0e-02; no speed-up is reported"
    ):
        command(finished_run, tmp_path, monkeypatch)
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_a_run_that_is_cut_off_keeps_its_rows(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(subject: model.Subject, lengths: list[int]) -> Iterator[model.Row]:
        for number, row in enumerate(measure(subject, lengths)):
            if number == 4:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(speed_model, "verify_model", lambda *arguments: None)
    monkeypatch.setattr(speed_model, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        command(finished_run, tmp_path, monkeypatch)
    kept = pd.read_csv(tmp_path / "speed_model_cpu.partial.csv")
    assert (
        len(kept) == 4 and kept["ms"].gt(0).all() and kept["versions"].str.contains("torch").all()
    )


@torch.no_grad()
def test_the_lean_network_is_the_model_on_full(finished_run: Path) -> None:
    subject = load(str(finished_run), torch.device("cpu"))
    lean, text = lean_network(subject.model), subject.tokens(2, 30)
    assert lean.embed.weight.data_ptr() == subject.model.network.embed.weight.data_ptr()
    want = subject.model(text, force="full").logits
    torch.testing.assert_close(lean(text, lambda layer, hidden: 0), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_rows_of_a_fitted_run(finished_run: Path) -> None:
    subject = load(str(finished_run), torch.device("cpu"))
    rows = list(measure(subject, [40]))
    names = ["routed", "force full", "full"]
    assert [(row["what"], row["variant"]) for row in rows] == [
        (what, n) for what in ("prefill", "decode") for n in names
    ]
    for row in rows:
        assert row["ms"] > 0 and row["tokens_per_s"] == pytest.approx(
            1e3 * (40 if row["what"] == "prefill" else 2 * model.STEPS) / row["ms"]
        )
        rivals = [
            other["ms"]
            for other in rows
            if other["what"] == row["what"] and "full" in other["variant"]
        ]
        assert row["speedup"] == pytest.approx(min(rivals) / row["ms"])
        if row["variant"] == "routed":
            assert sum(
                row[f"load_{name}"] for name in subject.config.model.experts
            ) == pytest.approx(1)
            assert 0 < row["cost_paper"] <= 1
            assert row["cost_flops"] > 0 and row["model_flops"] > 0 and row["model_mbytes"] > 0
    context = subject.config.data.context
    assert not note_on_context(subject, [context])
    assert f"made for {context} tokens: at {2 * context}" in note_on_context(
        subject, [context, 2 * context]
    )


def test_costs_are_those_of_the_routes_at_their_positions(finished_run: Path) -> None:
    subject = load(str(finished_run), torch.device("cpu"))
    network, (L, B, T, start) = subject.model.network, (2, 3, 5, 30)
    route, experts, heads = (
        torch.randint(3, (L, B, T, 1)),
        network.experts()[0],
        network.config.kv_heads,
    )
    row = model._routes(subject, route, Mode.DECODE, start)
    at = [hard_flops(experts, start + t + 1, heads, Mode.DECODE) for t in range(T)]
    own = (
        sum(
            float(at[t].own[e])
            for rows in route[..., 0].tolist()
            for some in rows
            for t, e in enumerate(some)
        )
        / route.numel()
    )
    full = sum(float(cost.own[0]) for cost in at) / T
    assert row["cost_flops"] == pytest.approx((own + at[0].shared) / full)
    whole = model_cost(subject.model, start + T, Mode.DECODE, batch=B)
    assert row["model_mflops"] == pytest.approx((L * own + whole.flops.shared) / 1e6)
    share = torch.bincount(route.flatten(), minlength=3) / route.numel()
    assert row["model_mbytes"] == pytest.approx(whole.bytes.mean(share) / 1e6)
    assert [row["load_full"], row["load_gated"], row["load_local"]] == pytest.approx(share.tolist())
    prefill = model._routes(subject, torch.zeros(L, 1, 40, 1, dtype=torch.int64), Mode.PREFILL)
    assert prefill["cost_paper"] == 1 and prefill["cost_flops"] > 1  # full, and the states beside


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
