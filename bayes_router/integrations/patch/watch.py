"""What can go wrong in silence where a patched model is trained: told once, or refused."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.integrations.patch.passes import Pass, checkpointed_without_graph
from bayes_router.training.distributed import joined

ADVICE = (
    "train with bayes_router.integrations.huggingface.trainer.RoutingTrainer in place of Hugging "
    "Face's Trainer; or give the "
    "optimiser router.parameters() and add weight * router.kl() to the loss; or "
    "router.requires_grad_(False), to mean it"
)


class TrainingWatch:
    """Watches the training passes of one router.

    Whether what was added is trained, and by its KL too.
    """

    def __init__(self, router: nn.Module):
        self.router: Any = router
        self.told = False  # or seen that all is well
        self.shared = False  # the gradients of the last pass, among processes
        # some of the router's weights, and of the model's
        self.before: tuple[tuple[int, int], list[Tensor]] | None = None

    def drawn(self, layer: int) -> None:
        """A layer's routes were drawn in training mode.

        Raises:
            ValueError: a reentrant checkpoint runs the layer, so that a KL of its routes would have
                no gradient.
        """
        mine = _first(self.router.controller.layers[layer].parameters())
        require(
            mine is None or not checkpointed_without_graph(),
            "gradient checkpointing",
            "use_reentrant=False: a reentrant checkpoint runs its layers without a graph, and the "
            "KL of their routes would "
            "have no gradient",
            "use_reentrant=True",
            "model.gradient_checkpointing_enable({'use_reentrant': False}), or "
            "router.requires_grad_(False)",
        )
        if (
            layer == 0
            and mine is None
            and torch.is_grad_enabled()
            and _first(self.router.model.parameters()) is None
        ):
            self._tell(
                "its weights and what the patch added are all frozen, and no loss has a gradient: "
                "to train routes"
            )

    def went_backward(self, of: Pass) -> None:
        """A backward pass went through the routes of a training pass.

        Were the weights moved since the one before?
        """
        mine = _first(self.router.controller.layers[-1].out.parameters())
        if self.told or mine is None or not of.executed or not self.router.training:
            return
        theirs = _first(self.router.found[-1].module.parameters())
        watched = [mine, mine if theirs is None else theirs]
        which = id(watched[0]), id(watched[1])
        before, self.before = self.before, (which, [_some(p) for p in watched])
        if before is None or before[0] != which:  # others are trained now
            return
        moved, beside = (
            not torch.equal(x, y) for x, y in zip(before[1], self.before[1], strict=True)
        )
        if beside and not moved:
            self._tell(
                "its weights are trained under routes drawn at random, and what the patch added is "
                "not"
            )
        elif moved and not of.kl_taken:
            self._tell("what the patch added is trained without its KL, hence without a price")
        processes = joined().size
        if moved and processes > 1 and not self.shared:
            self._tell(
                f"{processes} processes train it, and each what the patch added by itself, unless "
                "they call router.share_gradients() before each step"
            )
        self.shared = False
        self.told = self.told or moved

    def _tell(self, what: str) -> None:
        if not self.told:
            warnings.warn(f"{type(self.router.model).__name__}: {what}: {ADVICE}", stacklevel=2)
        self.told = True


def _first(parameters: Iterator[Tensor]) -> Tensor | None:
    """The first one that is trained."""
    return next((p for p in parameters if p.requires_grad), None)


def _some(parameter: Tensor) -> Tensor:
    """A few of its numbers: fused optimisers do not count what they write."""
    return parameter.detach().flatten()[:64].clone()
