"""The examples on models of Hugging Face run at toy size and show what they say.

Each is a screen.
"""

from pathlib import Path

import pytest

from bayes_router.attention.experts.contract import _REGISTRY
from tests.examples.test_examples import EXAMPLES, load

pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore:.*its own weights moved:UserWarning")


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_patch_and_fit() -> None:
    cost, same = load("patch_and_fit").main(steps=8)
    assert same and abs(cost - 0.5) <= 0.2


def test_trainer_learns_and_keeps_the_patch(tmp_path: Path) -> None:
    rows = load("trainer").main(steps=12, folder=str(tmp_path))
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["routing_cost"] < 1
    assert (tmp_path / "router.safetensors").is_file() and (
        tmp_path / "model.safetensors"
    ).is_file()


def test_peft_and_router() -> None:
    pytest.importorskip("peft")
    losses, same = load("peft_and_router").main(steps=16)
    assert same and sum(losses[-4:]) < sum(losses[:4])


def test_static_cache() -> None:
    answers = load("serve_static_cache").main(new_tokens=6, steps=3)
    assert [answer.shape[1] for answer in answers] == [46, 46]


def test_custom_expert() -> None:
    try:
        losses, load_ = load("custom_expert").main(steps=12)
    finally:
        _REGISTRY.pop("running_mean", None)
    assert losses[-1] < losses[0] and float(load_.sum()) == pytest.approx(1)


def test_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    example = load("lm_eval_task")
    routers, usual = [], example.patch
    monkeypatch.setattr(
        example, "patch", lambda *a, **k: routers.append(usual(*a, **k)) or routers[0]
    )
    scores = example.main(str(tmp_path))
    assert set(scores) == {"unpatched", "routed"} and all(0 <= s <= 1 for s in scores.values())
    # what was read last is a question of the harness, on routes of the router
    assert routers[0].statistics()[0] is not None


def test_each_is_a_screen() -> None:
    for path in EXAMPLES.glob("*.py"):
        if path.name != "mini_router.py":
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 70, path
