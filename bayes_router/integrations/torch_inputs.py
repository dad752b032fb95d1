"""Inputs of a patched PyTorch module, read as a text is: where tokens go, and what that costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.checks import require
from bayes_router.data.tokens import Batch
from bayes_router.integrations.patch.turned import Turned
from bayes_router.transformer.freezing import check_share, choosing, decided
from bayes_router.types import IGNORED, RoutingMode, RoutingOutput

Loss = Callable[[Any], Tensor]


def arguments(x: Any) -> tuple[Any, ...]:
    """What a module is called with."""
    return x if isinstance(x, tuple) else (x,)


class Inputs(Turned[Any]):
    """A patched module and its inputs, as `Dial` turns a model over a text.

    All inputs together are its one window, and every real token of them counts alike. A layer that
    reads fewer tokens than another (a decoder beside its encoder) has its last one repeated, which
    costs nothing.

    Args:
        router: a `RoutedTorch`.
        inputs: what the module is called with.

    Raises:
        ValueError: no input.
    """

    def __init__(self, router: Any, inputs: Sequence[Any]):
        kind = type(inputs).__name__
        listed = isinstance(inputs, Sequence) and not isinstance(inputs, str)
        require(listed, "inputs", "a list of what the module is called with", kind)
        require(len(inputs) > 0, "inputs", "one or more", "none")
        super().__init__(router)
        self.inputs = inputs
        self.weight = torch.empty(0)  # [L, N], of each token in the mean of its layer

    def windows(self, context: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """One, which stands for all inputs; nothing of it is scored."""
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        return iter([Batch(nothing, torch.full_like(nothing, IGNORED))])

    @torch.no_grad()
    def __call__(self, tokens: Tensor, mode: RoutingMode) -> RoutingOutput:
        """Where every real token of every input goes: [L, 1, N, R, E] and [L, 1, N, R]."""
        layers = range(len(self.router.layers))
        parts = [[list[Tensor](), list[Tensor]()] for _ in layers]
        with self.router.forced_to(None, mode):
            for x in self.inputs:
                self.router.model(*arguments(x))
                last = self.router.routed()
                for layer, (concentration, route) in enumerate(parts):
                    concentration.append(last.tokens(layer, last.concentration[layer]))
                    route.append(last.tokens(layer, last.executed[layer]))
        numbers = [sum(part.shape[1] for part in route) for _, route in parts]
        weights = torch.zeros(len(layers), max(numbers), dtype=torch.float64)
        for layer, number in enumerate(numbers):
            weights[layer, :number] = 1 / number
        self.weight = weights
        q, routes = (
            torch.stack([_filled(torch.cat(of[i], 1), max(numbers)) for of in parts])
            for i in (0, 1)
        )
        return RoutingOutput(torch.zeros(1, 1, 1, device=q.device), q, routes)

    def cost(self, route: Tensor) -> float:
        """What routes [L, 1, N, R] cost, full = 1: the mean over real tokens, units and layers."""
        costs = self.router.layer_cost.double().cpu()  # [L, E]
        paid = costs[torch.arange(len(costs))[:, None, None], route[:, 0].cpu()].mean(-1)
        return float((paid * self.weight).sum(1).mean())

    def load(self, route: Tensor) -> Tensor:
        """Share of the real tokens of each layer and unit on each expert, [L, R, E]."""
        number = self.router.layer_cost.shape[1]
        taken = F.one_hot(route[:, 0].cpu(), number).double()  # [L, N, R, E]
        return (taken * self.weight[:, :, None, None]).sum(1)


def _filled(x: Tensor, number: int) -> Tensor:
    """[1, n, ...] as [1, number, ...]: the last repeated."""
    return torch.cat([x, x[:, -1:].expand(-1, number - x.shape[1], *x.shape[2:])], 1)


@dataclass(frozen=True)
class FrozenUnits:
    """What `RoutedTorch.freeze` found, on inputs that chose no unit.

    Attributes:
        frozen: units whose route is static now.
        units: all of them, over layers.
        loss_before: mean over inputs, of the loss that was given or of the squared distance from
            the original module's output, before.
        loss: after.
        cost_before: executed cost of attention before, full = 1.
        cost: after.
        inputs: on which loss and cost were read.
    """

    frozen: int
    units: int
    loss_before: float
    loss: float
    cost_before: float
    cost: float
    inputs: int

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"{self.frozen} of {self.units} units frozen: loss {self.loss_before:.4g} -> "
            f"{self.loss:.4g}, cost {self.cost_before:.3f} -> {self.cost:.3f} "
            f"({self.inputs} inputs)"
        )


@torch.no_grad()
def freeze(router: Any, inputs: Sequence[Any], share: float, loss: Loss | None) -> FrozenUnits:
    """Set `router.frozen` by the first half of `inputs`; see `RoutedTorch.freeze`."""
    check_share(share)
    whole = Inputs(router, inputs)
    require(len(inputs) >= 2, "inputs", "two or more", len(inputs), "some choose, some tell")
    half = len(inputs) // 2
    first, second = (Inputs(router, part) for part in (inputs[:half], inputs[half:]))
    was_training = whole.training

    def read() -> tuple[float, float]:
        """(loss, cost) on the second half."""
        cost = second.cost(second(torch.empty(0), RoutingMode.HARD).route)
        losses = []
        with router.forced_to(None, RoutingMode.HARD):
            for x in second.inputs:
                target = None if loss is not None else router.original(x)
                out = router.model(*arguments(x))
                losses.append(router.distance(out, target) if loss is None else loss(out))
        return float(torch.stack(losses).mean()), cost

    router.train(False)
    try:
        with choosing(router):
            chosen = decided(first.load(first(torch.empty(0), RoutingMode.HARD).route), share)
            before = read()
            router.frozen = chosen
            after = read()
    finally:
        router.train(was_training)
    return FrozenUnits(
        chosen.number, chosen.total, before[0], after[0], before[1], after[1], len(second.inputs)
    )
