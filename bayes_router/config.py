"""Settings: frozen, validated when made, read from and written to TOML.

Presets are settings by name.

A field is named `section.field` everywhere: in TOML, on the command line and in error messages.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

import tomli_w
from jsonargparse import ArgumentError, ArgumentParser

from bayes_router.checks import one_line, require, unknown
from bayes_router.settings.fit import CORPUS_DEFAULT, DataConfig, TrainConfig
from bayes_router.settings.network import ModelConfig
from bayes_router.settings.prior import PriorConfig, ScheduleConfig
from bayes_router.wording import plain

__all__ = [
    "CORPUS_DEFAULT",
    "SURE_ENOUGH",
    "Config",
    "DataConfig",
    "ModelConfig",
    "PriorConfig",
    "ScheduleConfig",
    "TrainConfig",
    "config_from_dict",
    "config_from_toml",
    "load_config",
    "with_changes",
]

SURE_ENOUGH = 0.7
"""The probability of being the right expert from which a choice counts as sure."""


@dataclass(frozen=True)
class Config:
    """Everything that makes a run.

    Attributes:
        model: the Transformer and its experts.
        prior: the compute-aware prior.
        schedule: what changes over training.
        data: what is read.
        train: how parameters are found.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Check what spans sections."""
        for section, table in asdict(self).items():
            for name, value in table.items():
                require(
                    _finite(value),
                    f"{section}.{name}",
                    f"finite numbers, of at most {FLOAT32_MAX:g}",
                    value,
                )
        num_experts, num_layers = len(self.model.experts), self.model.num_layers
        ratios = self.prior.cost_ratio
        require(
            ratios is None or len(ratios) == num_experts,
            "prior.cost_ratio",
            f"one number for each of the experts {', '.join(self.model.experts)}",
            ratios,
        )
        self.prior.check_shapes(num_layers, num_experts, self.model.num_units)
        self.schedule.check_experts(self.model.experts, self.model.num_units)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries; unset (None) fields are left out, as TOML has no null."""
        return {
            section: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in table.items()
                if value is not None
            }
            for section, table in asdict(self).items()
        }

    def to_toml(self) -> str:
        """The settings as TOML; `load_config` reads it back unchanged."""
        return tomli_w.dumps(self.to_dict())


def config_from_dict(values: Mapping[str, Any], base: Optional[Config] = None) -> Config:
    """Settings from nested dictionaries, over `base` (the defaults if None).

    Raises:
        ValueError: unknown section or field, wrong type, or a value that the settings refuse.
    """
    base = base or Config()
    for section, table in values.items():
        require(isinstance(table, Mapping), section, "a table of settings", table)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, None)
    merged = {
        section: {**asdict(base)[section], **values.get(section, {})} for section in asdict(base)
    }
    unknown_sections = set(values) - set(merged)
    if unknown_sections:
        raise unknown("section", sorted(unknown_sections)[0], merged)
    for section, table in values.items():
        known = {f.name for f in fields(getattr(base, section))}
        for key in table:
            if key not in known:
                raise unknown(f"{section}.*", key, known)
    try:
        made = parser.instantiate(parser.parse_object(merged))
    except (ArgumentError, TypeError) as error:
        raise ValueError(plain(one_line(error))) from error
    return Config(**{section: getattr(made, section) for section in merged})


FLOAT32_MAX = 3.4e38
"""Settings enter tensors of float32, where a larger number is infinite."""


def _finite(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return not isinstance(value, float) or abs(value) <= FLOAT32_MAX


def config_from_toml(text: str) -> Config:
    """What `Config.to_toml` wrote; a ValueError for another text."""
    return config_from_dict(tomllib.loads(text))


def load_config(path: Path, base: Optional[Config] = None) -> Config:
    """Settings from a TOML file, over `base`.

    Raises:
        ValueError: the file is missing, is not TOML, or holds settings that are refused; the
            message names the file.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config: expected a TOML file; {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"config: expected a TOML file in UTF-8; {path} has an invalid byte at {error.start}"
        ) from error
    except (OSError, RecursionError, tomllib.TOMLDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"config: expected a TOML file; {path}: {why}") from error
    try:
        return config_from_dict(values, base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with dotted fields changed: {"train.steps": 10}."""
    tables: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        tables.setdefault(section, {})[key] = value
    return config_from_dict(tables, config)
