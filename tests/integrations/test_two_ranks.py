"""Two processes that train one patched model: what was added is shared as the model is."""

import multiprocessing
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("accelerate")
from bayes_router.integrations.huggingface.trainer import RoutingTrainer  # noqa: E402
from bayes_router.integrations.patching import patch  # noqa: E402
from bayes_router.types import RoutingMode  # noqa: E402
from tests.integrations.test_trainer import ROWS, arguments, routed  # noqa: E402
from tests.integrations.tiny_models import scatter_routes, tiny, tokens  # noqa: E402

SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "logging_steps": 2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
}


def trained(folder: Path, rows: int, rank: int = 0, **settings: Any) -> dict[str, Any]:
    """Weights after two steps, and what was logged of them; no draws: MEAN."""
    torch.manual_seed(0)
    model, router = routed()
    router.mode = RoutingMode.MEAN
    with torch.no_grad():
        for p in router.parameters():
            p += 0.3 * rank  # the first one's count
    args = arguments(folder, per_device_train_batch_size=rows, **SETTINGS, **settings)
    trainer = RoutingTrainer(
        model=model, args=args, train_dataset=ROWS, router_lr=0.1, kl_weight=0.5
    )
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "routing_kl" in row)
    weights = torch.cat([p.detach().flatten() for p in (*router.parameters(), *model.parameters())])
    return {"weights": weights.numpy(), "kl": logged["routing_kl"]}


def by_hand(rank: int, shared: bool) -> dict[str, Any]:
    """Two steps of a loop of one's own, each process on other text."""
    model = tiny("llama")
    router = patch(DistributedDataParallel(model), window=6)
    scatter_routes(router)
    wrapped = DistributedDataParallel(model.train())
    router.train()
    optimiser = torch.optim.SGD([*model.parameters(), *router.parameters()], lr=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.manual_seed(rank)
            out = wrapped(input_ids=tokens().roll(rank, 1), labels=tokens(), use_cache=False)
            (out.loss + 0.01 * router.kl()).backward()
            if shared:
                router.share_gradients()
            optimiser.step()
            optimiser.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in router.parameters()])
    told = [str(one.message) for one in said if "share_gradients" in str(one.message)]
    return {"weights": weights.numpy(), "told": told}


def in_each(pipe: Any, rank: int, port: int, folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    found = {"trainer": trained(folder, 2, rank, ddp_backend="gloo")}
    found |= {"shared": by_hand(rank, True), "alone": by_hand(rank, False)}
    pipe.send(found)
    dist.destroy_process_group()


@pytest.mark.slow  # two processes that import torch and transformers
def test_what_was_added_is_shared_among_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(2):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=in_each, args=(there, rank, port, tmp_path), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        assert all(here.poll(300) for here in pipes)
        one, other = (here.recv() for here in pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    alone = trained(tmp_path, 4)
    for rank in (one, other):
        torch.testing.assert_close(
            torch.tensor(rank["trainer"]["weights"]),
            torch.tensor(alone["weights"]),
            atol=1e-5,
            rtol=1e-4,
        )
        assert rank["trainer"]["kl"] == pytest.approx(alone["kl"], rel=1e-3)
    assert (one["shared"]["weights"] == other["shared"]["weights"]).all()
    assert (
        not one["shared"]["told"] and (one["alone"]["weights"] != other["alone"]["weights"]).any()
    )
    assert len(one["alone"]["told"]) == 1
    assert (
        "2 processes train it, and each what the patch added by itself" in one["alone"]["told"][0]
    )
