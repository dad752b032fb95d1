"""Checkpoints that nobody meant to write.

One error that names the file, and nothing in them is ever run.
"""

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bayes_router.config import load_config
from bayes_router.files import CONFIG, METRICS, STATE, WEIGHTS
from bayes_router.training.checkpoint import DIGEST_BYTES, load_checkpoint, load_run
from bayes_router.training.fit import fit
from bayes_router.training.metrics import MetricsLog
from bayes_router.training.optimise import build_optimiser
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.saving import weights_digest
from tests.fuzz.damage import ALL, Damage
from tests.tiny import fit_config

STEPS = 12


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@lru_cache
def target() -> tuple[RoutedLanguageModel, torch.optim.Optimizer]:
    """What checkpoints are read into."""
    model = RoutedLanguageModel.from_config(fit_config("x"))
    return model, build_optimiser(model, fit_config("x").train)


def resume(run: Path) -> dict[str, Any]:
    return load_checkpoint(run, *target(), STEPS)


def refused(read: Callable[[], object], file: str) -> None:
    with pytest.raises(ValueError, match=f"{file}: expected") as error:
        read()
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    assert type(error.value) is ValueError  # ours, not one that a library raised


@pytest.mark.parametrize("damage", ALL)
def test_damaged_states_are_refused(run: Path, damage: Damage) -> None:
    whole, rng = (run / STATE).read_bytes(), random.Random(damage.__name__)
    assert resume(run)["step"] == STEPS
    for _ in range(8):
        (run / STATE).write_bytes(damage(whole, rng))
        refused(lambda: resume(run), STATE)


@pytest.mark.parametrize("damage", ALL)
def test_damaged_weights_are_refused(run: Path, damage: Damage) -> None:
    whole, rng = (run / WEIGHTS).read_bytes(), random.Random(damage.__name__)
    load_run(run)
    for _ in range(8):
        (run / WEIGHTS).write_bytes(damage(whole, rng))
        refused(lambda: load_run(run), WEIGHTS)


@pytest.mark.parametrize("place", [0, 8, 9, 20, 200, -1, -100])
def test_every_part_of_the_weights_is_held(run: Path, place: int) -> None:
    """Length, header, names, tensors: one bit anywhere."""
    whole = bytearray((run / WEIGHTS).read_bytes())
    for bit in range(8):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        (run / WEIGHTS).write_bytes(bytes(flipped))
        refused(lambda: load_run(run), WEIGHTS)


# Files that are whole, with a checksum that is right, and say something else


def sealed(state: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_protocol=protocol)
    return buffer.getvalue() + sha256(buffer.getvalue()).digest()


def good_state(run: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO((run / STATE).read_bytes()[:-DIGEST_BYTES]), weights_only=True)


def put(state: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    *parents, last = path.split("/")
    table = state
    for parent in parents:
        table = table[int(parent) if parent.isdigit() else parent]
    table[int(last) if last.isdigit() else last] = value
    return state


WRONG = [
    *[
        ("progress/step", value)
        for value in (-1, STEPS + 1, 3.5, "4", None, True, [1], float("nan"), 10**30)
    ],
    *[("progress/skipped", value) for value in (-1, "x", None, 0.5)],
    *[("progress/in_a_row", value) for value in (-3, {}, None)],
    *[("progress/seconds", value) for value in ("late", -1.0, float("inf"), float("nan"), None)],
    *[("progress", value) for value in (None, [], 7, {})],
    *[("model", value) for value in (None, [], {}, {"a": 1}, torch.zeros(3))],
    *[
        ("model/network.embed.weight", value)
        for value in (None, 3, "x", torch.zeros(2, 2), torch.zeros(0))
    ],
    ("model/network.embed.weight", torch.zeros(256, 16, 1)),
    *[("optimiser", value) for value in (None, [], {}, {"state": {}, "param_groups": []})],
    *[("optimiser/param_groups", value) for value in ([], [{}], None, [{"params": [0]}])],
    *[("optimiser/state/0/exp_avg", value) for value in (torch.zeros(2), torch.zeros(()), None, 1)],
    *[("optimiser/state/0", value) for value in ({}, None, 3)],
]


@pytest.mark.parametrize(
    ("path", "value"), WRONG, ids=[f"{path}-{i}" for i, (path, _) in enumerate(WRONG)]
)
def test_wrong_types_and_shapes_in_a_state_are_refused(run: Path, path: str, value: object) -> None:
    (run / STATE).write_bytes(sealed(put(good_state(run), path, value)))
    refused(lambda: resume(run), STATE)


@pytest.mark.parametrize("state", [None, 3, [], {}, "state", torch.zeros(2)], ids=str)
def test_other_objects_than_a_state_are_refused(run: Path, state: object) -> None:
    (run / STATE).write_bytes(sealed(state))
    refused(lambda: resume(run), STATE)


class Hostile:
    """Unpickled, it would run `call`."""

    def __init__(self, call: Callable[..., object], *arguments: object):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def hostile(mark: Path) -> list[object]:
    return [
        Hostile(os.system, f"touch {mark}"),
        Hostile(exec, f"open({str(mark)!r}, 'w')"),
        Hostile(eval, f"open({str(mark)!r}, 'w')"),
        Hostile(open, str(mark), "w"),
        Hostile(os.mkdir, str(mark)),
        Hostile(pickle.loads, pickle.dumps(Hostile(os.system, f"touch {mark}"))),
        Hostile(torch.load, str(mark)),
        Hostile(__import__, "antigravity"),
        Hostile(shutil.copy, __file__, str(mark)),
    ]


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("where", ["whole file", "progress", "model", "bare pickle", "weights"])
def test_nothing_in_a_checkpoint_is_run(run: Path, tmp_path: Path, number: int, where: str) -> None:
    mark = tmp_path / "mark"
    bad = hostile(mark)[number]
    if where == "bare pickle":
        payload = pickle.dumps(bad)
        (run / STATE).write_bytes(payload + sha256(payload).digest())
    elif where == "weights":
        (run / WEIGHTS).write_bytes(pickle.dumps(bad))
        refused(lambda: load_run(run), WEIGHTS)
        assert not mark.exists()
        return
    else:
        state = good_state(run)
        (run / STATE).write_bytes(sealed(bad if where == "whole file" else put(state, where, bad)))
    refused(lambda: resume(run), STATE)
    assert not mark.exists()


def test_the_hostile_pickles_would_strike_elsewhere(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(hostile(mark)[3])).close()
    assert mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.pop("network.norm.weight"),
        lambda w: w.update({"more": torch.zeros(2)}),
        lambda w: w.update({"network.embed.weight": torch.zeros(4, 4)}),
        lambda w: w.update({"network.blocks.7.up.weight": torch.zeros(4, 4)}),
        lambda w: w.clear(),
        lambda w: w.update({"network.blocks.x.up.weight": torch.zeros(1)}),
    ],
)
@pytest.mark.parametrize("metadata", [None, {"sha256": "0" * 64}, {"other": "x"}])
def test_weights_of_something_else_are_refused(
    run: Path, change: Callable[[dict[str, torch.Tensor]], object], metadata: dict[str, str] | None
) -> None:
    weights = load_file(run / WEIGHTS)
    change(weights)
    save_file(weights, run / WEIGHTS, metadata)
    refused(lambda: load_run(run), WEIGHTS)


@pytest.mark.parametrize(
    "line",
    [
        "num_layers = 1000000000",
        "d_model = 1073741824",
        "mlp_ratio = 1e9",
        "vocab_size = 999999999999",
        "controller_hidden = 8000000",
    ],
)
@pytest.mark.parametrize("bound", [True, False])
def test_settings_that_claim_a_giant_model_are_refused_before_it_is_built(
    run: Path, line: str, bound: bool
) -> None:
    if not bound:  # as runs of before
        weights = load_file(run / WEIGHTS)
        save_file(weights, run / WEIGHTS, {"sha256": weights_digest(weights)})
    name = line.split(" = ")[0]
    text = (run / "config.toml").read_text()
    lines = [line if old.startswith(f"{name} = ") else old for old in text.splitlines()]
    (run / "config.toml").write_text("\n".join(lines))
    refused(lambda: load_run(run), CONFIG if bound else WEIGHTS)
    if bound:
        refused(lambda: fit(load_config(run / "config.toml"), run, resume=True), CONFIG)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"a,b\n1,2\n", b"step,nll\nx,y\n", b"step,nll\n1e999,0\n"]
)
def test_damaged_metrics_are_refused(run: Path, content: bytes) -> None:
    (run / METRICS).write_bytes(content)
    refused(
        lambda: MetricsLog(run, 12) if content != b"step,nll\n1e999,0\n" else refuse_infinite(run),
        METRICS,
    )


def refuse_infinite(run: Path) -> None:
    log = MetricsLog(run, 12)
    if not log.rows:  # a step that no run has is dropped like any later one
        raise ValueError(f"{METRICS}: expected nothing more")


def test_a_summary_does_not_matter_to_a_resumed_run(corpus: str, run: Path) -> None:
    (run / "summary.json").write_text("{")
    fit(fit_config(corpus), run, resume=True, progress=False)
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
