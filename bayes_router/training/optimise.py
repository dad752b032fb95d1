"""The optimiser: AdamW with parameter groups, linear warm-up and cosine decay."""

import math

import torch
from torch import nn

from bayes_router.config import TrainConfig
from bayes_router.training.sharding import is_sharded, whole_tensor
from bayes_router.transformer.model import RoutedLanguageModel


def build_optimiser(model: RoutedLanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """Groups of parameters with their own decay and rates.

    Matrices (decayed), gains and embeddings (not), controllers (not, with their own learning rate).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.network.named_parameters():
        (decayed if parameter.dim() >= 2 and name != "embed.weight" else plain).append(parameter)
    parameters = (decayed, plain, list(model.controller.parameters()))
    groups = [
        {"params": one, "peak": peak, "weight_decay": decay}
        for one, peak, decay in zip(
            parameters, peak_rates(config), (config.weight_decay, 0.0, 0.0), strict=True
        )
    ]
    # fused on a GPU: one kernel, and it can skip a step without asking the host; but not of
    # parameters that are cut over ranks
    fused = True if plain[0].is_cuda and not is_sharded(model) else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=fused)


def peak_rates(config: TrainConfig) -> tuple[float, float, float]:
    """Peak learning rates of the groups, in their order."""
    return config.lr, config.lr, config.controller_lr


def set_peaks(optimiser: torch.optim.Optimizer, config: TrainConfig) -> None:
    """Let the settings decide, whatever a checkpoint was written with."""
    for group, peak in zip(optimiser.param_groups, peak_rates(config), strict=True):
        group["peak"] = peak


def set_learning_rate(optimiser: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Learning rate of `step`.

    Linear to the peak over `warmup` steps, then half a cosine to `lr_floor` x peak.
    """
    if step < config.warmup:
        factor = (step + 1) / config.warmup
    else:
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        factor = config.lr_floor + (1 - config.lr_floor) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, progress))
        )
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor
    return config.lr * factor


def clip_gradient(model: nn.Module, largest: float) -> torch.Tensor:
    """Scale the gradient to a norm of at most `largest`; returns the norm before, []."""
    return whole_tensor(nn.utils.clip_grad_norm_(model.parameters(), largest))
