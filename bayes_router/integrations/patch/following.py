"""What was added to a model follows it: mode, device, dtype, and whether anything is trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.integrations.patch.found import Found
from bayes_router.integrations.patch.offload import device_of
from bayes_router.routing.controller import MetaController


class Following(nn.Module):
    """Controllers and layers beside a model that they are no part of.

    They follow it when it is called: mode and device are the model's; so is the dtype, but half
    precision stays float32 here, which posteriors and sums over the past need; and `requires_grad`
    is copied whenever the model's changes (whether any weight is trained), so that
    `router.requires_grad_(True)` after `model.requires_grad_(False)` trains the router alone.
    """

    controller: MetaController
    layers: nn.ModuleList
    # whether any of the model's weights was, when the flags here were last set
    _trainable: bool | None = None

    def __init__(self, model: nn.Module, found: Sequence[Found]):
        super().__init__()
        self._base = (model,)  # in a tuple: not a submodule
        self.found = tuple(found)

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self._base[0]

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs, also where its weights are offloaded."""
        return device_of(self.model)

    @property
    def training(self) -> bool:
        """The model's own mode."""
        return self._base[0].training if "_base" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # the model's mode is the only one

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the model."""
        self.model.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set the flags of what was added; they stay until the model's change."""
        self._trainable = any(p.requires_grad for p in self.model.parameters())
        super().requires_grad_(requires_grad)
        return self

    def follow(self) -> None:
        """Take over the model's device, dtype and flags.

        The dtype where it is wider than float32, the flags where they changed.

        A pass does, and `fit`; to read `parameters()` of a model that has moved since, or that was
        frozen, call it before.
        """
        for index, one in enumerate(self.found):
            # offloaded weights are nowhere
            own = next((p for p in one.module.parameters() if not p.is_meta), None)
            if own is not None:
                self.place(index, own)
        trainable = any(p.requires_grad for p in self.model.parameters())
        if trainable != self._trainable:
            self.requires_grad_(trainable)

    def place(self, index: int, like: Tensor) -> None:
        """Move what was added to a layer beside `like`; parameters stay the same objects."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        mine = self.controller.layers[index].get_parameter("out.bias")
        if mine.device != like.device or mine.dtype != dtype:
            with torch.inference_mode(False):  # they may be trained later
                self.controller.layers[index].to(like.device, dtype)
                self.layers[index].to(like.device, dtype)

    @contextmanager
    def only_this(self, weights: bool = False) -> Iterator[None]:
        """Gradients for what was added alone, and for the model's own weights where asked.

        Then all flags as they were.

        Raises:
            ValueError: autograd cannot read the model's weights, or no optimiser could move them.
        """
        require(
            not any(p.is_inference() for p in self.model.parameters()),
            "model",
            "weights that autograd may read",
            "weights made inside torch.inference_mode",
            "load the model outside of it",
        )
        require(
            not (weights and any(p.is_meta for p in self.model.parameters())),
            "weights_lr",
            "0 where weights are offloaded",
            "a positive one",
            "load the model whole to train its own weights",
        )
        self.follow()
        mine, theirs = (
            [(p, p.requires_grad) for p in self.parameters()],
            [(p, p.requires_grad) for p in self.model.parameters()],
        )
        for p, _ in theirs:
            p.requires_grad_(weights)
        self.requires_grad_(True)
        try:
            yield
        finally:
            for p, flag in theirs:
                p.requires_grad_(flag)
            self.requires_grad_(True)  # notes the model's
            for p, flag in mine:
                p.requires_grad_(flag)
