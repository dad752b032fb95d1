"""Settings by name."""

from bayes_router.checks import unknown
from bayes_router.config import (
    Config,
    DataConfig,
    ModelConfig,
    PriorConfig,
    ScheduleConfig,
    TrainConfig,
)


def _from_layout(*experts: str) -> ScheduleConfig:
    """Half of training on a static layout, hardly disturbed; then the price comes."""
    return ScheduleConfig(start_experts=experts, start_share=0.98, anneal_from=0.5, anneal_to=0.8)


PRESETS: dict[str, Config] = {
    "tiny": Config(),
    "small": Config(
        model=ModelConfig(d_model=256, num_layers=6, num_heads=4, window=32),
        prior=PriorConfig(map="uniform"),
        schedule=_from_layout("gated", *4 * ("local",), "full"),
        data=DataConfig(context=512),
        train=TrainConfig(
            steps=5000, batch_size=16, lr=2e-3, controller_lr=2e-3, warmup=200, precision="bfloat16"
        ),
    ),
    "base": Config(
        model=ModelConfig(d_model=512, num_layers=8, num_heads=8, window=128),
        prior=PriorConfig(map="uniform"),
        schedule=_from_layout("gated", *6 * ("local",), "full"),
        data=DataConfig(context=2048),
        train=TrainConfig(
            steps=20_000,
            batch_size=16,
            lr=1e-3,
            controller_lr=1e-3,
            warmup=500,
            precision="bfloat16",
        ),
    ),
}
"""`tiny` learns its routes from scratch.

The larger ones start on a static layout and let a price move tokens off it.
"""


def preset(name: str) -> Config:
    """The settings called `name`.

    Raises:
        ValueError: no such preset; the message lists those there are.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
