"""A layer's controller and policy as one Triton kernel, where nobody asks for a gradient.

An operator that torch.compile takes whole and a CUDA graph may hold.
"""

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.operator import operator
from bayes_router.attention.shapes import widen
from bayes_router.routing.controller import LayerController, MetaController
from bayes_router.routing.evidence import LayerEvidence
from bayes_router.routing.policy import Argmax, Budget, like
from bayes_router.routing.watch import Look, looks


def tilt_of(policy: Any, like_this: Tensor) -> Tensor | None:
    """The tilt price x cost, [E] or [R, E], of a policy that is an argmax after it.

    None of `Argmax`.

    Raises:
        TypeError: it is another policy; ask `chooses` before.
    """
    if type(policy) is Budget:
        return like(policy.cost_ratio, like_this, policy.price)
    if type(policy) is Argmax:
        return None
    raise TypeError(f"policy: expected Argmax or Budget; got {type(policy).__name__}")


def chooses(policy: Any) -> bool:
    """Whether the kernel knows this policy; of any other it computes the posterior alone."""
    return type(policy) in (Argmax, Budget)


def controller_input(hidden: Tensor) -> Tensor:
    """Scaled to unit root mean square, float32 at least: what a patch's controller reads, on one
    scale in all layers and models.
    """
    return F.rms_norm(widen(hidden), hidden.shape[-1:])


def watched(controller: nn.Module) -> bool:
    """Whether a hook looks at what a controller reads or says: no pass may leave it out."""
    return bool(controller._forward_pre_hooks or controller._forward_hooks)


class AnyWatched:
    """`watched` of any of several controllers, asked in C, as every pass asks it."""

    def __init__(self) -> None:
        self._of: list[nn.Module] = []
        self._hooks: list[dict[int, Any]] = []

    def __call__(self, controllers: Iterable[nn.Module]) -> bool:
        """Of these now."""
        now = [*controllers]
        if now != self._of:
            self._of = now
            self._hooks = [x for m in now for x in (m._forward_pre_hooks, m._forward_hooks)]
        return any(self._hooks)


def called(controller: nn.Module) -> bool:
    """Whether a hook needs the controller to be called: one that is no `Look`, or is traced."""
    hooks = controller._forward_pre_hooks.values()
    if torch.compiler.is_compiling():
        return watched(controller)
    return bool(controller._forward_hooks) or not all(isinstance(hook, Look) for hook in hooks)


def _show(controller: nn.Module, hidden: Tensor, normed: bool) -> None:
    """Show what the kernel reads in a controller's place to those who look at that."""
    for look in looks(controller):
        if look.watch is None:
            look.see(look.layer, controller_input(hidden) if normed else hidden)
        else:
            density = look.watch.evidence.of(look.layer)
            look.watch.take(look.layer, distance(density, hidden.detach(), normed))


def distance(density: LayerEvidence, hidden: Tensor, normed: bool) -> Tensor:
    """`LayerEvidence.distance` of hidden states [B, T, D] in one launch: [B, T], float32.

    `normed`: hidden states are scaled to unit root mean square first.
    """
    # only where Triton can be imported
    from bayes_router.attention.kernels.triton.distance import launch_distance

    if density.centre.device != hidden.device:
        density.to(hidden.device)
    found = torch.empty(hidden.shape[:2], device=hidden.device, dtype=torch.float32)
    x = hidden.reshape(-1, hidden.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    if len(x):
        with torch.cuda.device_of(x):
            launch_distance(x, density.directions, density.centre, found.view(-1), normed)
    return found


def replaced(meta: MetaController) -> bool:
    """Whether a subclass, or whoever set it on this object, has another posterior than the one that
    the kernel computes.
    """
    return "posterior" in vars(meta) or type(meta).posterior is not MetaController.posterior


def available(hidden: Tensor, controller: LayerController) -> bool:
    """Whether the kernel takes these: CUDA, controllers in float32 or the type of the hidden states
    that no hook needs to be called, no gradient wanted.
    """
    if called(controller) or "forward" in vars(controller):
        return False
    if not (hidden.is_cuda and capability.HAS_TRITON and hidden.dtype in capability.TYPES):
        return False
    grad = torch.is_grad_enabled() and (hidden.requires_grad or controller.out.weight.requires_grad)
    width = controller.out.in_features if controller.hidden is not None else 0
    fits = width <= 256 and controller.out.out_features <= 256
    return fits and not grad and controller.out.weight.dtype in (torch.float32, hidden.dtype)


def fused(
    hidden: Tensor,
    controller: LayerController,
    floor: float,
    tilt: Tensor | None,
    normed: bool = True,
) -> tuple[Tensor, Tensor]:
    """(concentration [B, T, R, E] float32, choice int64 [B, T, R]): argmax of log concentration -
    tilt, or of it.

    `normed`: hidden states are scaled to unit root mean square first.
    """
    out, inner, units = controller.out, controller.hidden, controller.num_units
    experts = out.out_features // units
    if tilt is not None:
        tilt = tilt.expand(units, experts).contiguous()
    _show(controller, hidden, normed)
    first, first_bias = (out.weight, None) if inner is None else (inner.weight, inner.bias)
    found: tuple[Tensor, Tensor] = _route(
        hidden, first, first_bias, out.weight, out.bias, tilt, floor, units, normed
    )
    return found


def chosen(
    meta: MetaController, layer: int, hidden: Tensor, policy: Any
) -> tuple[Tensor, Tensor] | None:
    """(concentration [B, T, R, E], choices int64 [B, T, R]) of hidden states as they are, by the
    kernel.

    None where it does not take them, or does not know the policy.
    """
    controller = meta.layers[layer]
    known = not replaced(meta) and chooses(policy)
    if not (known and type(controller) is LayerController and available(hidden, controller)):
        return None
    tilt = tilt_of(policy, torch.empty(0, device=hidden.device))  # its type and place
    return fused(hidden, controller, meta.floor, tilt, normed=False)


def _outputs(hidden: Tensor, out_bias: Tensor, units: int) -> tuple[Tensor, Tensor]:
    shape, experts = (*hidden.shape[:2], units), len(out_bias) // units
    choice = torch.empty(shape, device=hidden.device, dtype=torch.int64)
    return torch.empty(*shape, experts, device=hidden.device, dtype=torch.float32), choice


@operator("bayes_router::route")
def _route(
    hidden: Tensor,
    first: Tensor,
    first_bias: Optional[Tensor],
    out_weight: Tensor,
    out_bias: Tensor,
    tilt: Optional[Tensor],
    floor: float,
    units: int,
    normed: bool,
) -> tuple[Tensor, Tensor]:
    # only where Triton can be imported
    from bayes_router.attention.kernels.triton.route import launch_route

    concentration, choice = _outputs(hidden, out_bias, units)
    x = hidden.reshape(-1, hidden.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    if len(x):
        with torch.cuda.device_of(x):
            weights = first.contiguous(), first_bias, out_weight.contiguous(), out_bias
            written = concentration.flatten(0, 1), choice.flatten(0, 1)
            launch_route(x, *weights, tilt, floor, *written, normed)
    return concentration, choice


@_route.register_fake
def _(
    hidden: Tensor,
    first: Tensor,
    first_bias: Optional[Tensor],
    out_weight: Tensor,
    out_bias: Tensor,
    tilt: Optional[Tensor],
    floor: float,
    units: int,
    normed: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(hidden, out_bias, units)
