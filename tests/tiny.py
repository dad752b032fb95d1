"""A model small enough for a test, and data to feed it."""

import torch
from torch import Tensor

from bayes_router.config import Config, ModelConfig, PriorConfig, config_from_dict
from bayes_router.transformer.build import build_prior
from bayes_router.transformer.model import RoutedLanguageModel

EXPERTS = ("full", "linear", "local", "gated")


def tiny_config(**changes: object) -> ModelConfig:
    settings: dict[str, object] = {
        "vocab_size": 23,
        "d_model": 16,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "experts": EXPERTS,
        "window": 5,
        "controller_hidden": 8,
    }
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> RoutedLanguageModel:
    """A model whose controllers route differently for different tokens."""
    torch.manual_seed(seed)
    model = RoutedLanguageModel(tiny_config(**changes))
    for controller in model.controller.layers:
        torch.nn.init.normal_(controller.out.weight, std=1.5)  # type: ignore[union-attr, arg-type]
    return model


def tiny_batch(B: int = 2, T: int = 40, vocab: int = 23, seed: int = 1) -> tuple[Tensor, Tensor]:
    sequence = torch.randint(vocab, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous()


def tiny_concentration(config: ModelConfig) -> Tensor:
    return build_prior(PriorConfig(temperature=0.5), config, config.num_layers, 64).concentration


def fit_config(path: str, **train: object) -> Config:
    """Settings of a fit that takes seconds."""
    return config_from_dict(
        {
            "model": {
                "d_model": 16,
                "num_layers": 2,
                "num_heads": 2,
                "window": 8,
                "controller_hidden": 4,
            },
            "data": {"corpus": f"text:{path}", "context": 32, "eval_tokens": 512},
            "train": {
                "steps": 12,
                "batch_size": 4,
                "eval_every": 6,
                "checkpoint_every": 4,
                "warmup": 2,
                "device": "cpu",
                **train,
            },
        }
    )
