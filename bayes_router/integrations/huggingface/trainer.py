"""Training what a patch added by Hugging Face's Trainer.

Beside the model's own weights, or alone.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from bayes_router.checks import positive, require
from bayes_router.integrations.huggingface.fit_settings import KL_WEIGHT
from bayes_router.integrations.patch.binding import router_of
from bayes_router.integrations.patch.routed import RoutedModel
from bayes_router.integrations.patch.saving import is_patch, load_weights
from bayes_router.integrations.patch.sharing import share_weights
from bayes_router.routing.statistics import executed_load
from bayes_router.training.distributed import joined

ROUTER_LR = 3e-3


_Trainer: Any = Trainer if TYPE_CHECKING else object  # it stands in front of any kind of Trainer


class RoutedTraining(_Trainer):
    """What makes a Trainer train the routes of a patched model.

    `class Mine(RoutedTraining, SFTTrainer)` of any kind of it.

    The loss becomes task loss + kl_weight * KL(posterior || prior), the KL in nats per real token
    and summed over layers: a negative ELBO where the task loss is a mean negative log likelihood.
    The optimiser gets the parameters that the patch added as a group of their own, so that
    schedules, mixed precision and resuming hold for them too. Every log has the KL, the executed
    cost (full = 1) and the load of each expert; an evaluation those of the routes that it executed
    (HARD). Every checkpoint has the patch beside the model's weights, so that `load_patch` reads
    it, and resuming goes on from it.

    Several processes share what was added as they share the model: they begin with the weights of
    the first, and step by the mean of their gradients.

    To train the routes alone, freeze the model first: model.requires_grad_(False).

    The model is patched, also inside a wrapper.

    Args:
        kl_weight: of the KL; default 0.02 over the number of layers, as of `fit`.
        router_lr: learning rate of what was added; the Trainer's schedule scales it as its own.

    Raises:
        ValueError: the model is not patched, or FSDP or DeepSpeed trains it.
    """

    def __init__(
        self,
        *args: Any,
        kl_weight: float | None = None,
        router_lr: float = ROUTER_LR,
        **settings: Any,
    ):
        super().__init__(*args, **settings)
        router = router_of(self.model)
        require(
            router is not None,
            "model",
            "a patched model",
            type(self.model).__name__,
            "call patch(model) first",
        )
        for kind in ("fsdp", "deepspeed"):
            split = bool(getattr(self, f"is_{kind}_enabled", False))
            require(not split, kind, "none: it would not know what was added", kind, "use DDP")
        for name, value in (("kl_weight", kl_weight), ("router_lr", router_lr)):
            if value is not None:
                positive(name, value)
        assert isinstance(router, RoutedModel)
        self.router = router
        self.kl_weight = KL_WEIGHT / len(router.layers) if kl_weight is None else kl_weight
        self.router_lr = router_lr
        self._read: dict[str, list[Tensor]] = {}
        router.requires_grad_(True)
        self.add_callback(_CleanGradients(router))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **more: Any,
    ) -> Any:
        """The task loss and, in training, the weighted KL."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **more)
        if self.router.last.concentration:  # not forced
            kl = self.router.kl()
            if model.training:
                loss = loss + self.kl_weight * self._share(num_items_in_batch) * kl.to(loss.device)
            self._note("" if model.training else "eval_", kl)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **named: Any) -> Tensor:
        """The Trainer's own; with the last part of a batch, what processes tell each other."""
        loss: Tensor = super().training_step(*args, **named)
        if self.accelerator.sync_gradients:
            self.router.share_gradients()
        return loss

    def _share(self, num_items: Any) -> float:
        """Of the KL in one part of an accumulated batch.

        The Trainer divides later only a loss that is not scaled yet.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items is not None
            )
        return (
            1 / self.current_gradient_accumulation_steps if scaled and self.model.training else 1.0
        )

    def _note(self, when: str, kl: Tensor) -> None:
        """Keep what the next log says of the pass, on its device."""
        last, cost = self.router.last.detached(), []
        loads = []
        for layer, route in sorted(last.executed.items()):
            load = executed_load(last.tokens(layer, route), len(self.router.experts))
            loads.append(load.cpu() if self.router.device.type == "cpu" else load)
            cost.append(loads[-1] @ self.router.layer_cost[layer].to(load))
        values = {"kl": kl.detach(), "cost": torch.stack(cost).mean()}
        values |= {
            f"load_{name}": x
            for name, x in zip(self.router.experts, torch.stack(loads).mean(0), strict=True)
        }
        for name, value in values.items():
            self._read.setdefault(f"{when}routing_{name}", []).append(value)

    def log(self, logs: dict[str, float], *args: Any, **named: Any) -> None:
        """The Trainer's own, and how tokens were routed since the last one."""
        evaluated = any(name.startswith("eval_") for name in logs)
        for name in [name for name in self._read if name.startswith("eval_") == evaluated]:
            logs[name] = float(joined().mean(torch.stack(self._read.pop(name)).mean()))
        super().log(logs, *args, **named)

    def create_optimizer(self, *args: Any, **named: Any) -> Any:
        """The Trainer's own, with what was added as one more group, without decay."""
        optimiser = super().create_optimizer(*args, **named)
        known = {id(p) for group in optimiser.param_groups for p in group["params"]}
        added = [p for p in self.router.parameters() if id(p) not in known]
        if added:
            optimiser.add_param_group({"params": added, "lr": self.router_lr, "weight_decay": 0.0})
        return optimiser

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The Trainer's own; then what was added, by itself."""
        norm = super()._clip_grad_norm(model)
        nn.utils.clip_grad_norm_(self.router.parameters(), self.args.max_grad_norm)
        return norm

    def save_model(self, output_dir: str | None = None, *args: Any, **named: Any) -> None:
        """The model, and the patch beside it."""
        super().save_model(output_dir, *args, **named)
        if self.args.should_save:
            with warnings.catch_warnings():  # the weights that moved are saved beside it
                warnings.filterwarnings(
                    "ignore", message=".*its own weights moved", category=UserWarning
                )
                self.router.save(self.args.output_dir if output_dir is None else output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **named: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **named)
        self._load_router(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_router(self.state.best_model_checkpoint)

    def _load_router(self, folder: str) -> None:
        require(
            is_patch(Path(folder)),
            "resume_from_checkpoint",
            "a checkpoint with a patch",
            folder,
            "of RoutedTraining",
        )
        load_weights(self.router, folder)


class _CleanGradients(TrainerCallback):
    """Forgets gradients after each step, as the Trainer does with those of the model alone."""

    def __init__(self, router: RoutedModel):
        self.router = router

    def on_train_begin(self, *args: Any, **named: Any) -> None:
        """Before the first step."""
        self.router.zero_grad()
        share_weights(self.router.parameters())

    def on_optimizer_step(self, *args: Any, **named: Any) -> None:
        """After each step."""
        self.router.zero_grad()


class RoutingTrainer(RoutedTraining, Trainer):
    """Hugging Face's Trainer for a patched model; see `RoutedTraining`."""
