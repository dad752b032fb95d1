"""Hugging Face's Trainer on a patched model.

The routes are trained, logged, saved and resumed, or a warning says that not.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments  # noqa: E402

from bayes_router.config import PriorConfig  # noqa: E402
from bayes_router.integrations.huggingface.trainer import RoutedTraining, RoutingTrainer  # noqa: E402
from bayes_router.integrations.patch.saving import SETTINGS  # noqa: E402
from bayes_router.integrations.patching import load_patch, patch  # noqa: E402
from bayes_router.types import RoutingMode  # noqa: E402
from tests.integrations.tiny_models import tiny, tokens  # noqa: E402

ROWS = [
    {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)}
    for row in tokens(16, 14)
]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2,
        "report_to": [], "seed": 3,
        "use_cpu": True, "learning_rate": 1e-3, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**usual, **settings})


def routed(frozen: bool = False, price: float = 2.0, route_by: str = "layer") -> tuple[Any, Any]:
    model = tiny("llama")
    model.requires_grad_(not frozen)
    prior = PriorConfig(price=price)
    router = patch(model, window=4, experts=("full", "local"), prior=prior, route_by=route_by)
    return model, router


def moved(module: nn.Module, before: list[Tensor]) -> int:
    return sum(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def copied(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.filterwarnings("error::UserWarning:bayes_router")
@pytest.mark.parametrize(
    ("precision", "by"), [({}, "layer"), ({"bf16": True}, "layer"), ({"bf16": True}, "head")]
)
@pytest.mark.parametrize("frozen", [True, False])
def test_routes_are_trained_beside_the_weights_or_alone(
    frozen: bool, precision: dict[str, bool], by: str, tmp_path: Path
) -> None:
    model, router = routed(frozen, route_by=by)
    base, added = copied(model), copied(router.controller)
    trainer = RoutingTrainer(
        model=model,
        args=arguments(tmp_path, **precision),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        router_lr=0.05,
    )
    trainer.train()
    assert moved(model, base) == (0 if frozen else len(base)) and moved(
        router.controller, added
    ) == len(added)
    assert all(p.grad is None or not p.grad.any() for p in router.parameters())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["routing_kl"] > 0 and row["routing_load_full"] + row[
            "routing_load_local"
        ] == pytest.approx(1)
        cost = row["routing_load_full"] + 0.3 * row["routing_load_local"]
        assert row["routing_cost"] == pytest.approx(cost, abs=1e-5)
    read = trainer.evaluate()
    with torch.no_grad():
        model(**{name: torch.stack([row[name] for row in ROWS[:4]]) for name in ROWS[0]})
    assert read["eval_loss"] > 0
    said = trainer.state.log_history[-1]
    assert said["eval_routing_cost"] == pytest.approx(
        sum(one.cost for one in router.statistics()) / 2, abs=0.05
    )


@pytest.mark.parametrize(("parts", "by"), [(1, "layer"), (2, "layer"), (2, "head")])
def test_the_loss_is_the_task_and_the_weighted_kl(parts: int, by: str, tmp_path: Path) -> None:
    """One step of SGD without decay: the gradient is that of the mean over both parts."""
    model, router = routed(route_by=by)
    settings = {
        "max_steps": 1,
        "gradient_accumulation_steps": parts,
        "per_device_train_batch_size": 4 // parts,
    }
    settings |= {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }
    expected_model, expected = routed(route_by=by)
    router.mode = expected.mode = RoutingMode.MEAN  # no draws: the same loss whatever the parts
    trainer = RoutingTrainer(
        model=model,
        args=arguments(tmp_path, **settings),
        train_dataset=ROWS[:4],
        kl_weight=0.5,
        router_lr=0.1,
    )
    before = copied(router)
    trainer.train()
    batch = {name: torch.stack([row[name] for row in ROWS[:4]]) for name in ROWS[0]}
    expected_model.train()
    (expected_model(**batch).loss + 0.5 * expected.kl()).backward()
    for p, q, right in zip(router.parameters(), before, expected.parameters(), strict=True):
        torch.testing.assert_close((q - p.detach()) / 0.1, right.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("by", ["layer", "kv_head"])
def test_a_checkpoint_holds_the_router_and_is_resumed_bit_for_bit(by: str, tmp_path: Path) -> None:
    ends = []
    for resume in (False, True):
        model, router = routed(route_by=by)
        trainer = RoutingTrainer(
            model=model, args=arguments(tmp_path), train_dataset=ROWS, router_lr=0.05
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        ends.append(copied(router) + copied(model))
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    fresh = type(model).from_pretrained(tmp_path / "checkpoint-4").eval()
    loaded = load_patch(fresh, tmp_path / "checkpoint-4")
    model.eval()
    assert torch.equal(loaded(tokens()).logits, router(tokens()).logits)
    (tmp_path / "checkpoint-4" / SETTINGS).unlink()
    with pytest.raises(ValueError, match="checkpoint with a patch"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_best_checkpoint_brings_its_router_back(tmp_path: Path) -> None:
    model, router = routed()
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    trainer = RoutingTrainer(
        model=model, args=arguments(tmp_path, greater_is_better=True, **settings),
        train_dataset=ROWS, eval_dataset=ROWS,
        router_lr=0.05,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    other = load_patch(type(model).from_pretrained(best).eval(), best)
    assert all(
        torch.equal(p, q) for p, q in zip(other.parameters(), router.parameters(), strict=True)
    )


def test_any_kind_of_trainer_is_served_and_a_model_without_a_patch_is_not(tmp_path: Path) -> None:
    class Own(Trainer):
        """Computes its own loss."""

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            out = model(**inputs)
            return (
                (out.logits.square().mean(), out) if return_outputs else out.logits.square().mean()
            )

    class Mine(RoutedTraining, Own):
        """Of that kind."""

    model, router = routed()
    added = copied(router.controller)
    Mine(
        model=model,
        args=arguments(tmp_path, save_strategy="no"),
        train_dataset=ROWS,
        router_lr=0.05,
    ).train()
    assert moved(router.controller, added) == len(added)
    with pytest.raises(ValueError, match="model: expected a patched model"):
        RoutingTrainer(model=tiny("llama"), args=arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(ValueError, match="kl_weight"):
        RoutingTrainer(model=model, args=arguments(tmp_path), train_dataset=ROWS, kl_weight=0.0)


def test_a_trainer_that_does_not_train_the_routes_is_told(tmp_path: Path) -> None:
    model, router = routed()
    plain = arguments(tmp_path, save_strategy="no")
    with pytest.warns(
        UserWarning,
        match=(
            "LlamaForCausalLM: its weights are trained under routes drawn at random.*RoutingTrainer"
        ),
    ):
        Trainer(model=model, args=plain, train_dataset=ROWS).train()
    model, router = routed(frozen=True)
    with (
        pytest.warns(UserWarning, match="all frozen"),
        pytest.raises(RuntimeError, match="require grad"),
    ):
        Trainer(model=model, args=plain, train_dataset=ROWS).train()
    model, router = routed()
    optimiser = torch.optim.SGD([*model.parameters(), *router.parameters()], lr=1e-3)
    with pytest.warns(UserWarning, match="without its KL"):
        Trainer(model=model, args=plain, train_dataset=ROWS, optimizers=(optimiser, None)).train()


def test_who_means_it_is_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for own in (False, True):
            model, router = routed()
            router.requires_grad_(own)
            optimiser = torch.optim.SGD([*model.parameters(), *router.parameters()], lr=1e-3)
            model.train()
            for _ in range(3):
                loss = model(tokens(), labels=tokens(), use_cache=False).loss
                (loss + 0.01 * router.kl() if own else loss).backward()
                optimiser.step()


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_what_splits_parameters_over_processes_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Trainer.create_accelerator_and_postprocess

    def split(self: Trainer) -> None:
        made(self)
        setattr(self, f"is_{kind}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", split)
    model, _ = routed()
    with pytest.raises(ValueError, match=f"{kind}: expected none.*use DDP"):
        RoutingTrainer(model=model, args=arguments(tmp_path), train_dataset=ROWS)
