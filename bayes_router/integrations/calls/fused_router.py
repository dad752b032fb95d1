"""The router of a layer in one piece: norm, controller of all units and policy, hidden states ->
choices.

On CUDA, where nobody asks for a gradient, that is one Triton kernel, an operator that torch.compile
takes whole and a CUDA graph may hold; `reference` says what it computes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet
from torch.nn import functional as F

from bayes_router.routing.controller import LayerController, MetaController
from bayes_router.transformer.fused import (
    available,
    chooses,
    controller_input,
    fused,
    replaced,
    tilt_of,
)
from bayes_router.types import RoutingMode


def reference(
    hidden: Tensor, controller: LayerController, floor: float, tilt: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `fused` computes, in plain torch: hidden [B, T, D] -> concentration [B, T, R, E], choice
    int64 [B, T, R].
    """
    concentration = floor + F.softplus(controller(controller_input(hidden)))
    score = concentration if tilt is None else concentration.log() - tilt
    return concentration, score.argmax(-1)


class Settled:
    """Which layers send every token to one expert whatever it reads, as an unfitted controller
    does.

    Asked once for each state of a layer's weights: that waits for a GPU, no later pass does.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int | None]] = {}

    def __call__(
        self, index: int, controller: LayerController, policy: Any, floor: float
    ) -> int | None:
        """The expert; None: the layer's tokens differ, or nobody may be asked now."""
        if torch.compiler.is_compiling() or not chooses(policy):
            return None
        weight, bias = controller.out.weight, controller.out.bias
        state = weight.data_ptr(), weight._version, bias._version, policy
        known = self._known.get(index)
        if known is None or known[0] != state:
            if torch.cuda.is_current_stream_capturing():
                return None
            known = self._known[index] = state, _settled(controller, policy, floor)
        return known[1]


def _settled(controller: LayerController, policy: Any, floor: float) -> int | None:
    if bool(controller.out.weight.any()):
        return None
    concentration = floor + F.softplus(
        controller.out.bias.detach().unflatten(-1, (controller.num_units, -1))
    )
    choices = set(policy(concentration).tolist())
    return choices.pop() if len(choices) == 1 else None


Decide = Callable[[Dirichlet, RoutingMode, Tensor], Tensor]
"""(posterior, mode, what the controller read) -> the executed route."""


def infer(
    posterior: Callable[[int, Tensor], Dirichlet],
    meta: MetaController,
    index: int,
    hidden: Tensor,
    mode: RoutingMode,
    policy: Any,
    settled: Settled,
    decide: Decide,
) -> tuple[Dirichlet, Tensor, int | None]:
    """(posterior, the executed route, the one expert of all tokens where that is known) of a
    layer's tokens [B, T, D].

    `policy` is what `decide` asks; the kernel takes the place of both where it can, and nothing
    does where it is None.
    """
    controller = meta.layers[index]
    assert isinstance(controller, LayerController)
    if policy is None or replaced(meta) or not available(hidden, controller):
        read = controller_input(hidden)
        q = posterior(index, read)
        return q, decide(q, mode, read), None
    known = mode is RoutingMode.HARD and chooses(policy)
    tilt = tilt_of(policy, controller.out.weight) if known else None
    concentration, choice = fused(hidden, controller, meta.floor, tilt)
    q = Dirichlet(concentration, validate_args=False)
    if not known:
        return q, decide(q, mode, controller_input(hidden)), None
    return q, choice, settled(index, controller, policy, meta.floor)


FULL_UP_TO = 4096
"""Tokens of a text up to which routing is left alone.

`python -m analysis.speed.patched` reads where it begins to save.
"""


def takes_full(x: Tensor, T: int, names: Sequence[str], up_to: int) -> bool:
    """Whether routing could only lose time: T tokens of a short text over itself, on the GPU of x,
    whose experts are full and local.
    """
    return 1 < T <= up_to and x.is_cuda and all(name in ("full", "local") for name in names)
