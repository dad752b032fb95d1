"""A training step's loss and gradient as a CUDA graph.

Captured once, replayed every step, without Python in between.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayes_router.attention.experts.contract import expert_class
from bayes_router.checks import require
from bayes_router.config import Config
from bayes_router.types import LossTerms

WARMUP = 3
"""Passes before capture: kernels are compiled and libraries set up in them."""

Gradient = Callable[[Tensor, Tensor], tuple[Tensor, LossTerms, Tensor]]
"""(tokens, targets) -> loss [], its terms, gradient norm [].

Leaves the gradient in the parameters.
"""


def wants_graph(config: Config, device: torch.device, processes: int) -> bool:
    """Whether `train.graph` asks for a graph here.

    `on`, or `auto` where one can be captured for sure.

    Raises:
        ValueError: `on`, where none can be captured.
    """
    train, graph = config.train, config.train.graph
    facts = {"device": (device.type, "cuda"), "processes": (processes, 1)}
    facts |= {"train.accumulate": (train.accumulate, 1), "train.draws": (train.draws, "batch")}
    against = [f"{name} {value}" for name, (value, needed) in facts.items() if value != needed]
    needs = ", ".join(f"{name} {needed}" for name, (_, needed) in facts.items())
    require(
        not (graph == "on" and against),
        "train.graph",
        f"auto or off, as on needs {needs}",
        ", ".join(against),
    )
    # experts made elsewhere may wait for the device, which cannot be captured
    ours = all(
        expert_class(name).__module__.startswith("bayes_router.") for name in config.model.experts
    )
    return graph == "on" or (graph == "auto" and ours and not against)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    targets: Tensor
    outputs: Tensor  # loss, terms, norm
    gradients: list[tuple[nn.Parameter, Tensor]]


class GraphedGradient:
    """Replays `gradient`, whose shapes and control flow must be fixed, from a CUDA graph.

    Everything that changes from step to step has to lie in tensors that stay where they are:
    parameters, the prior's concentration, its price and the KL weight (`NegativeELBO.follow`).
    torch's generator is read at every replay, so draws are those of the step's seed, the same as
    without a graph.

    Args:
        gradient: what to capture.
        model: whose parameters receive the gradient.
    """

    def __init__(self, gradient: Gradient, model: nn.Module):
        self.gradient, self.model = gradient, model
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: Any = None  # of all graphs: what one keeps between its steps no other needs

    def __call__(
        self, tokens: Tensor, targets: Tensor, seed: int, form: Hashable
    ) -> tuple[Tensor, LossTerms, Tensor]:
        """Loss, terms and gradient norm of a batch.

        Another `form` of the objective, or shape, is another graph.
        """
        key = (tokens.shape, form)
        if key not in self._captured:
            self._captured[key] = self._capture(tokens, targets)
        known = self._captured[key]
        known.tokens.copy_(tokens, non_blocking=True)
        known.targets.copy_(targets, non_blocking=True)
        torch.manual_seed(seed)
        known.graph.replay()
        for parameter, gradient in known.gradients:
            parameter.grad = gradient
        # the next replay writes over them
        loss, nll, kl, elbo, norm = known.outputs.clone().unbind()
        return loss, LossTerms(nll, kl, elbo), norm

    def _capture(self, tokens: Tensor, targets: Tensor) -> _Captured:
        tokens, targets = tokens.clone(), targets.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self.model.zero_grad(set_to_none=True)
                self.gradient(tokens, targets)
        torch.cuda.current_stream().wait_stream(side)
        # so that the backward pass allocates the gradient inside the graph
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            loss, terms, norm = self.gradient(tokens, targets)
            outputs = torch.stack([x.float() for x in (loss.detach(), *terms, norm)])
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        return _Captured(graph, tokens, targets, outputs, gradients)
