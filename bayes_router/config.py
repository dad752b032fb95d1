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

from bayes_router.checks import choose, not_negative, one_line, positive, require, unknown
from bayes_router.types import CostModel, RouteBy
from bayes_router.wording import plain

CORPUS_DEFAULT = "sotu"
SURE_ENOUGH = 0.7
"""The probability of being the right expert from which a choice counts as sure."""


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer and its experts.

    Attributes:
        vocab_size: number of token ids; set from the tokeniser by `fit`.
        d_model: width of the residual stream.
        num_layers: routed layers.
        num_heads: query heads; d_model must be a multiple.
        num_kv_heads: key and value heads (grouped queries); by default num_heads.
        experts: registered names, in the order of the routing latent.
        route_by: what chooses: `layer` (all heads of a token together), `kv_head` (each key and
            value head), `head`.
        window: keys that `local` sees, the token itself included.
        mlp_ratio: hidden width of the MLP over d_model.
        rope_base: base of the rotary frequencies.
        controller_hidden: hidden width of each layer's controller; 0 for a linear one.
        concentration_floor: least concentration of the posterior.
    """

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: Optional[int] = None
    experts: tuple[str, ...] = ("full", "gated", "local")
    route_by: str = "layer"
    window: int = 32
    mlp_ratio: float = 4.0
    rope_base: float = 10_000.0
    controller_hidden: int = 64
    concentration_floor: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "window"):
            require(getattr(self, name) >= 1, f"model.{name}", "at least 1", getattr(self, name))
        require(
            self.d_model % (2 * self.num_heads) == 0,
            "model.d_model",
            f"a multiple of 2 x num_heads = {2 * self.num_heads} (rotary positions pair "
            f"dimensions)",
            self.d_model,
            "change d_model or num_heads",
        )
        kv = self.kv_heads
        require(
            kv >= 1 and self.num_heads % kv == 0,
            "model.num_kv_heads",
            f"a divisor of num_heads {self.num_heads}",
            kv,
        )
        choose("model.route_by", self.route_by, RouteBy)
        require(
            len(self.experts) >= 1, "model.experts", "at least one registered name", self.experts
        )
        require(
            len(set(self.experts)) == len(self.experts),
            "model.experts",
            "no name twice",
            self.experts,
        )
        require(self.mlp_ratio > 0, "model.mlp_ratio", "a positive number", self.mlp_ratio)
        require(self.rope_base > 1, "model.rope_base", "a number above 1", self.rope_base)
        require(
            self.controller_hidden >= 0,
            "model.controller_hidden",
            "0 (linear) or more",
            self.controller_hidden,
        )
        require(
            self.concentration_floor > 0,
            "model.concentration_floor",
            "a positive number",
            self.concentration_floor,
        )

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_units(self) -> int:
        """R, routing units of a layer."""
        return choose("model.route_by", self.route_by, RouteBy).units(self.num_heads, self.kv_heads)

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.d_model // self.num_heads


@dataclass(frozen=True)
class PriorConfig:
    """The compute-aware prior.

    Dirichlet(total_concentration * mean(cost)) for every token and layer.

    Attributes:
        cost: where cost ratios come from: paper, flops or latency.
        cost_ratio: cost ratios by hand, one an expert, full = 1; overrides `cost`.
        map: from cost ratio to prior mean: boltzmann, inverse or uniform.
        temperature: of the Boltzmann map; small means cheap.
        total_concentration: sum of the concentration; below 1 draws are nearly one-hot.
        price: nats per unit of cost ratio by which the prior is tilted, density times exp(-price *
            cost . route).
        layer_mean: prior mean of each layer by hand, one probability an expert; overrides the map.
        layer_temperature: temperature of each layer instead of one for all.
        layer_total_concentration: total concentration of each layer instead of one for all.
    """

    cost: str = "paper"
    cost_ratio: Optional[tuple[float, ...]] = None
    map: str = "boltzmann"
    temperature: float = 0.3
    total_concentration: float = 0.5
    price: float = 10.0
    layer_mean: Optional[tuple[tuple[float, ...], ...]] = None
    layer_temperature: Optional[tuple[float, ...]] = None
    layer_total_concentration: Optional[tuple[float, ...]] = None

    def __post_init__(self) -> None:
        """Check every field that does not need the experts."""
        for name, depth in (("mean", 2), ("temperature", 1), ("total_concentration", 1)):
            given, least = getattr(self, f"layer_{name}"), 0
            while isinstance(given, tuple) and given:
                given, least = given[0], least + 1
            require(
                least <= depth,
                f"prior.layer_{name}",
                "values by layer, which hold for all of its units",
                getattr(self, f"layer_{name}"),
                "a prior by unit is given to the program: RoutingModel(network, concentration "
                "[L, R, E])",
            )
        choose("prior.cost", self.cost, CostModel)
        for name in ("temperature", "total_concentration"):
            require(
                getattr(self, name) > 0, f"prior.{name}", "a positive number", getattr(self, name)
            )
            per_layer = getattr(self, f"layer_{name}")
            require(
                per_layer is None or min(per_layer) > 0,
                f"prior.layer_{name}",
                "positive numbers",
                per_layer,
            )
        not_negative("prior.price", self.price, "0 or more nats per unit of cost")


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes over training; times are fractions of it.

    Attributes:
        kl_weight: weight of the KL in the objective at the end; 1 is the literal ELBO.
        kl_warmup: fraction over which the KL weight grows linearly from a hundredth of it.
        start_total_concentration: total concentration of the prior before annealing (soft routes).
        start_experts: the expert that each layer's prior favours before annealing, cycled over
            layers; empty starts with the compute-aware prior.
        start_share: prior mean of that expert before annealing.
        anneal_from: when annealing of the prior (mean, total concentration and price) begins.
        anneal_to: when it ends.
        straight_through_from: when the network starts to execute the argmax of each draw, with the
            gradient of the draw; 1 is never.
    """

    kl_weight: float = 0.003
    kl_warmup: float = 0.0
    start_total_concentration: float = 0.5
    start_experts: tuple[str, ...] = ()
    start_share: float = 0.9
    anneal_from: float = 0.2
    anneal_to: float = 0.6
    straight_through_from: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        positive("schedule.kl_weight", self.kl_weight, "a tiny one stands for zero")
        require(
            0 <= self.kl_warmup <= 1, "schedule.kl_warmup", "a fraction of training", self.kl_warmup
        )
        require(
            self.start_total_concentration > 0,
            "schedule.start_total_concentration",
            "a positive number",
            self.start_total_concentration,
        )
        require(
            0 < self.start_share < 1, "schedule.start_share", "between 0 and 1", self.start_share
        )
        require(
            0 <= self.straight_through_from <= 1,
            "schedule.straight_through_from",
            "a fraction of training",
            self.straight_through_from,
        )
        require(
            0 <= self.anneal_from <= self.anneal_to <= 1,
            "schedule.anneal_from",
            "0 <= anneal_from <= anneal_to <= 1",
            (self.anneal_from, self.anneal_to),
        )


@dataclass(frozen=True)
class DataConfig:
    """What is read.

    Attributes:
        corpus: sotu, text:PATH, stdlib, recall, or hf:NAME, a data set of Hugging Face (extra
            `hf`).
        tokeniser: bytes or gpt2.
        prepared: folder that keeps tokenised corpora, written once and memory-mapped from then on:
            for text larger than memory. Empty reads the corpus into memory (hf: then keeps it in
            ~/.cache/bayes-router).
        context: tokens of a training sequence.
        valid_fraction: share of the text held out, by whole documents.
        eval_tokens: tokens of held-out text that an evaluation reads, at most.
    """

    corpus: str = CORPUS_DEFAULT
    tokeniser: str = "bytes"
    prepared: str = ""
    context: int = 256
    valid_fraction: float = 0.1
    eval_tokens: int = 32_768

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.context >= 1, "data.context", "at least 1 token", self.context)
        require(
            0 < self.valid_fraction < 1,
            "data.valid_fraction",
            "between 0 and 1",
            self.valid_fraction,
        )
        require(self.eval_tokens >= 1, "data.eval_tokens", "at least 1", self.eval_tokens)


@dataclass(frozen=True)
class TrainConfig:
    """How parameters are found.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences a step.
        lr: peak learning rate of AdamW.
        controller_lr: peak learning rate of the controllers.
        lr_floor: final learning rate over the peak (cosine decay).
        warmup: steps of linear warm-up.
        weight_decay: of matrices; none for gains, biases, embeddings.
        clip: largest gradient norm.
        eval_every: steps between evaluations on held-out text; 0 for the last only.
        checkpoint_every: steps between checkpoints; 0 for the last only.
        seed: of initialisation, batches and posterior draws.
        device: cpu, cuda, or auto.
        precision: float32 or bfloat16 (autocast; concentrations stay float32).
        accumulate: parts that a process cuts its rows into, one after another, for memory; the
            gradient is their mean.
        draws: what a posterior draw hangs on: `batch`, one stream a part; or `row`, one a row, so
            that any number of processes and parts gives the same losses, at the price of a sampling
            call for each row and layer.
        compile: compile attention and MLP of each block (torch.compile); Pyro's handlers see
            neither.
        graph: auto, on or off: replay the loss and its gradient from a CUDA graph, without time on
            the host. auto does it on one CUDA device with accumulate 1, draws batch and built-in
            experts.
        shard: cut parameters, gradients and moments over the processes of torchrun (FSDP2) instead
            of keeping all of them in each.
        recompute: keep no activations inside attention and MLP but compute them again backwards,
            for memory.
        max_skipped: steps in a row that may be skipped because loss or gradient is not finite.
        tensorboard: write event files to the run folder too (extra `tensorboard`).
    """

    steps: int = 600
    batch_size: int = 8
    lr: float = 3e-3
    controller_lr: float = 3e-3
    lr_floor: float = 0.05
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_every: int = 150
    checkpoint_every: int = 150
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    accumulate: int = 1
    draws: str = "batch"
    compile: bool = False
    graph: str = "auto"
    shard: bool = False
    recompute: bool = False
    max_skipped: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("steps", "batch_size", "accumulate"):
            require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        for name in ("lr", "controller_lr", "clip"):
            require(
                getattr(self, name) > 0, f"train.{name}", "a positive number", getattr(self, name)
            )
        for name in (
            "warmup",
            "weight_decay",
            "eval_every",
            "checkpoint_every",
            "seed",
            "max_skipped",
        ):
            require(getattr(self, name) >= 0, f"train.{name}", "0 or more", getattr(self, name))
        require(0 <= self.lr_floor <= 1, "train.lr_floor", "between 0 and 1", self.lr_floor)
        require(self.graph in ("auto", "on", "off"), "train.graph", "auto, on or off", self.graph)
        require(
            self.precision in ("float32", "bfloat16"),
            "train.precision",
            "float32 or bfloat16",
            self.precision,
        )
        require(self.draws in ("batch", "row"), "train.draws", "batch or row", self.draws)
        require(
            self.batch_size % self.accumulate == 0,
            "train.accumulate",
            f"a divisor of batch_size {self.batch_size}",
            self.accumulate,
            "change either",
        )


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
        for name in ("layer_temperature", "layer_total_concentration"):
            per_layer = getattr(self.prior, name)
            require(
                per_layer is None or len(per_layer) == num_layers,
                f"prior.{name}",
                f"{num_layers} numbers",
                per_layer,
            )
        for name in self.schedule.start_experts:
            if name not in self.model.experts:
                raise unknown("schedule.start_experts", name, self.model.experts)

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
