"""Several processes are one run: same losses, own draws, one writer.

Parts and forms of a step change nothing either.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bayes_router.config import Config, with_changes
from bayes_router.training import execution
from bayes_router.training.checkpoint import load_run
from bayes_router.training.distributed import World, connected, pick_device
from bayes_router.training.fit import Trainer, fit, load_data
from bayes_router.training.trainer import draw_seed, svi_objective
from bayes_router.types import LossTerms
from tests.tiny import fit_config
from tests.training.two_ranks import SHORT, build_double, losses

Result = dict[str, dict[str, list[float]]]


def torchrun(
    *arguments: object, processes: int = 2, check: bool = True
) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1",
    ]
    command = [*launch, f"--master-port={port}", *map(str, arguments)]
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=280
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def settings(corpus: str) -> Config:
    return with_changes(
        fit_config(corpus, steps=20, draws="row", lr=1e-2),
        {"schedule.anneal_from": 0.0, "schedule.anneal_to": 0.5},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(settings: Config, folder: Path) -> tuple[Result, Result]:
    out = folder
    (out / "settings.toml").write_text(settings.to_toml())
    torchrun("-m", "tests.training.two_ranks", out)
    first, second = (json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(2))
    return first, second


def test_two_processes_have_the_losses_of_one(
    settings: Config, ranks: tuple[Result, Result]
) -> None:
    one = losses(settings, World())
    assert one["mean"][0] != one["mean"][-1]
    for way in ("row", "row, accumulated"):
        assert ranks[0][way]["mean"] == pytest.approx(one["mean"], rel=1e-7)
        assert ranks[0][way]["weight"] == pytest.approx(one["weight"], abs=1e-7)
        assert ranks[0][way]["weight"] == ranks[1][way]["weight"]


def test_one_process_with_two_parts_draws_what_two_processes_draw(
    settings: Config, ranks: tuple[Result, Result]
) -> None:
    two_parts = losses(
        with_changes(settings, {"train.draws": "batch", "train.accumulate": 2}), World()
    )
    assert ranks[0]["batch"]["mean"] == pytest.approx(two_parts["mean"], rel=1e-7)


def test_draws_differ_between_ranks_and_are_reproducible(ranks: tuple[Result, Result]) -> None:
    assert (
        ranks[0]["batch"] == ranks[0]["batch again"]
        and ranks[1]["batch"] == ranks[1]["batch again"]
    )
    assert ranks[0]["batch"]["own"] != ranks[1]["batch"]["own"]
    seeds = [draw_seed(0, step, stream) for step in range(50) for stream in range(50)]
    assert len(set(seeds)) == len(seeds)


def test_a_gradient_that_one_rank_cannot_use_is_skipped_by_all(
    ranks: tuple[Result, Result],
) -> None:
    for rank in ranks:
        for way in ("poisoned", "poisoned, sharded"):
            assert rank[way] == {"kept": [1.0], "moved": [1.0], "skipped": [1.0]}


# Parameters that are cut over the two


def test_sharded_they_have_the_losses_of_copies(ranks: tuple[Result, Result]) -> None:
    for way in ("row", "row, accumulated"):
        sharded = ranks[0][way.replace("row", "sharded")]
        assert sharded["mean"] == pytest.approx(ranks[0][way]["mean"][:8], rel=1e-9)
        assert sharded["weight"] == ranks[1][way.replace("row", "sharded")]["weight"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_run(run)[1].state_dict()


def test_a_sharded_run_is_one_that_a_process_opens_and_resumes(
    settings: Config, ranks: tuple[Result, Result], folder: Path
) -> None:
    copies, cut = weights(folder / "copies"), weights(folder / "cut")
    for name, weight in copies.items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-4, atol=1e-5)
    stopped = weights(folder / "stopped")
    assert all(torch.equal(stopped[name], weight) for name, weight in cut.items())
    half = weights(folder / "half")
    assert not torch.equal(half["network.embed.weight"], cut["network.embed.weight"])
    alone = with_changes(settings, SHORT)
    model, summary = fit(alone, folder / "half", resume=True, progress=False)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-4, atol=1e-5)
    assert "held_bytes_per_rank" not in summary


def test_each_rank_holds_its_part(ranks: tuple[Result, Result], folder: Path) -> None:
    of_copies, of_parts = (
        json.loads((folder / run / "summary.json").read_text())["held_bytes_per_rank"]
        for run in ("copies", "cut")
    )
    # weight, gradient and two moments of float32; a count of steps for each tensor
    model = load_run(folder / "cut")[1]
    whole = 16 * sum(p.numel() for p in model.parameters())
    assert of_copies == [whole + 4 * len(list(model.parameters()))] * 2
    assert all(0.45 * whole < part < 0.6 * whole for part in of_parts)


def test_one_process_is_nothing_to_shard_over(settings: Config) -> None:
    config, data = load_data(with_changes(settings, {"train.shard": True}))
    with pytest.raises(ValueError, match="train.shard: expected several processes; got 1; .*false"):
        Trainer(config, data, torch.device("cpu"))


@pytest.mark.slow
def test_the_command_on_two_processes_ends_where_one_does(corpus: str, tmp_path: Path) -> None:
    config = fit_config(corpus, draws="row")
    _, alone = fit(config, tmp_path / "alone", progress=False)
    (tmp_path / "settings.toml").write_text(config.to_toml())
    done = torchrun(
        "-m",
        "bayes_router",
        "fit",
        "--config",
        tmp_path / "settings.toml",
        "--out",
        tmp_path / "two",
    )
    assert done.stdout.count("run folder") == 1
    assert done.stderr.count("step 6/12") == 1 and done.stderr.count("step 12/12") == 1
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["tokens_seen"] == alone["tokens_seen"]
    assert summary["nll"]["hard"] == pytest.approx(alone["nll"]["hard"], abs=1e-3)
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("alone", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3)


# One process: parts, recomputation and compilation


def first_gradient(
    config: Config, build_objective: object = svi_objective
) -> tuple[float, dict[str, torch.Tensor]]:
    config, data = load_data(config)
    trainer = Trainer(config, data, torch.device("cpu"), build_double, build_objective)  # type: ignore[arg-type]
    tokens, targets = data.train.batch(
        0, config.train.batch_size, config.data.context, config.train.seed
    )
    trainer.objective.follow(trainer.schedule.at(0))
    loss, _ = trainer._gradient(0, tokens, targets)
    return float(loss), {
        name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None
    }


def assert_same(
    got: tuple[float, dict[str, torch.Tensor]],
    want: tuple[float, dict[str, torch.Tensor]],
    tolerance: float,
) -> None:
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_neither_loss_nor_gradient(corpus: str, accumulate: int) -> None:
    want = first_gradient(fit_config(corpus, draws="row"))
    assert_same(first_gradient(fit_config(corpus, draws="row", accumulate=accumulate)), want, 1e-9)


def test_accumulation_with_draws_of_its_own_agrees_in_the_mean(corpus: str) -> None:
    whole = [first_gradient(fit_config(corpus, seed=7))[0]]
    parts = [first_gradient(fit_config(corpus, seed=7, accumulate=2))[0]]
    assert whole != parts  # other draws
    assert parts[0] == pytest.approx(whole[0], rel=0.05)  # of the same expectation


def test_recomputation_changes_nothing(corpus: str) -> None:
    assert_same(
        first_gradient(fit_config(corpus, recompute=True)),
        first_gradient(fit_config(corpus)),
        1e-12,
    )


def test_recomputation_keeps_fewer_activations(corpus: str) -> None:
    def kept(recompute: bool) -> int:
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            config, data = load_data(fit_config(corpus, recompute=recompute))
            trainer = Trainer(config, data, torch.device("cpu"))
            tokens, targets = data.train.batch(0, 4, 32, 0)
            with trainer.execution:
                trainer.objective(tokens, targets)
        return total

    assert kept(True) < 0.6 * kept(False)


def test_compilation_changes_nothing_and_happens_once(
    corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(execution.Execution.__init__, "__defaults__", (backend,))
    torch._dynamo.reset()
    assert_same(
        first_gradient(fit_config(corpus, compile=True)), first_gradient(fit_config(corpus)), 1e-9
    )
    config, data = load_data(fit_config(corpus, compile=True))
    trainer = Trainer(config, data, torch.device("cpu"))
    trainer.step(0)
    before = len(compiled)
    assert before > 0
    for step in range(1, 4):
        trainer.step(step)
    trainer.evaluate()
    trainer.step(4)
    assert len(compiled) == before
    assert "forward" not in vars(trainer.model.network.blocks[0].attention)


def test_a_batch_that_cannot_be_shared_out_is_refused(corpus: str) -> None:
    config, data = load_data(fit_config(corpus, accumulate=2))
    with pytest.raises(
        ValueError,
        match="train.batch_size: expected a multiple of processes x train.accumulate = 6; got 4",
    ):
        Trainer(config, data, torch.device("cpu"), world=World(0, 3))
    with pytest.raises(ValueError, match="train.accumulate: expected a divisor of batch_size 4"):
        fit_config(corpus, accumulate=3)


def test_half_a_launch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ValueError, match="WORLD_SIZE: .* got 'no RANK.*launch with torchrun"),
        connected(pick_device("cpu")),
    ):
        pass


def test_bfloat16_keeps_concentrations_in_float32_and_learns(corpus: str, tmp_path: Path) -> None:
    config = fit_config(corpus, precision="bfloat16", steps=40, lr=1e-2, warmup=3)
    config, data = load_data(config)
    trainer = Trainer(config, data, torch.device("cpu"))
    seen = []
    usual = trainer.model.controller.posterior

    def posterior(layer: int, hidden: torch.Tensor):  # type: ignore[no-untyped-def]
        q = usual(layer, hidden)
        seen.append(q.concentration.dtype)
        return q

    trainer.model.controller.posterior = posterior  # type: ignore[method-assign]
    terms: list[LossTerms] = [trainer.step(step)[0] for step in range(40)]
    assert set(seen) == {torch.float32}
    assert all(term.dtype == torch.float32 for term in terms[0])
    assert float(terms[-1].nll) < float(terms[0].nll) - 0.5
    exact = Trainer(
        *load_data(fit_config(corpus, steps=40, lr=1e-2, warmup=3)), torch.device("cpu")
    )
    assert float(exact.step(0)[0].nll) == pytest.approx(float(terms[0].nll), rel=0.02)
