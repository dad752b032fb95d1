"""One pass over held-out text with the routes executed.

What they cost, and what the model then says.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_router.checks import require
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.routing.policy import Argmax, Policy
from bayes_router.transformer.nll import token_nll
from bayes_router.types import IGNORED, RoutingMode, RoutingOutput

CountedCost = Callable[[Tensor], float]
"""Hard routes int64 [L, B, T, R] -> what they cost, full attention = 1, where a table of experts
does not say it."""


class Routed(Protocol):
    """A model whose hard routes a policy decides.

    A `RoutedLanguageModel`, or a patch as `Unforced` shows it.
    """

    policy: Policy
    training: bool

    def __call__(self, tokens: Tensor, mode: RoutingMode) -> RoutingOutput:
        """Logits, concentration and the executed route of tokens [B, T]."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set the mode."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those beside which tokens are put."""
        ...


@dataclass(frozen=True)
class Executed:
    """One executed pass over held-out text."""

    price: float  # nats per unit of cost ratio
    cost: float  # cost ratio of the executed routes, mean over tokens, layers and units
    # [L, E] float64, share of the tokens (of the weight, where routes are soft) on each expert
    load: Tensor
    window_nll: Tensor  # [windows] float64, sum over the scored tokens of each window, nats
    window_scored: Tensor  # [windows] float64, number of scored tokens

    @property
    def nll(self) -> float:
        """Nats per scored token."""
        return float(self.window_nll.sum() / self.window_scored.sum())

    def nll_above(self, other: "Executed") -> tuple[float, float]:
        """How many nats per token this reading lies above `other`, with the standard error.

        Both on the same windows, paired.
        """
        difference = (
            (self.window_nll - other.window_nll) * len(self.window_nll) / self.window_scored.sum()
        )
        return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)

    def of_windows(self, index: Tensor) -> "Executed":
        """The loss of the windows `index`, with repetition; cost and load are those of all."""
        nll, scored = self.window_nll[index], self.window_scored[index]
        return replace(self, window_nll=nll, window_scored=scored)


class ExecutedPass(NamedTuple):
    """What one pass gave."""

    reading: Executed
    concentration: Tensor  # [L, windows, T, R, E]
    route: Tensor  # [L, windows, T, R], or weights [L, windows, T, R, E]


def read_routes(
    model: Routed,
    source: TokenSource,
    cost_ratio: Tensor,
    *,
    context: int,
    batch_size: int,
    limit: int | None = None,
    mode: RoutingMode = RoutingMode.HARD,
    policy: Policy | None = None,
    price: float = 0.0,
    seed: int = 0,
) -> Executed:
    """Execute the routes of `model` on held-out windows: their cost, load and loss.

    Args:
        model: the fitted model; its policy and its mode (train, eval) are as before afterwards.
        source: held-out data.
        cost_ratio: [E], or [L, E] where layers differ; full = 1.
        context: tokens of a window.
        batch_size: windows at a time.
        limit: read at most this many tokens.
        mode: SAMPLE, MEAN or HARD.
        policy: of HARD; argmax by default.
        price: noted in the reading.
        seed: of the draws of SAMPLE; the generator of the caller is left as it was.
    """
    windows = source.windows(context, batch_size, limit)
    return execute(model, windows, cost_ratio, mode, policy or Argmax(), price, seed).reading


@torch.no_grad()
def execute(
    model: Routed,
    windows: Iterable[Batch],
    cost: Tensor | CountedCost,
    mode: RoutingMode,
    policy: Policy,
    price: float,
    seed: int = 0,
) -> ExecutedPass:
    """`read_routes` over given windows, with what it knows of each token; `cost` may be counted."""
    device = next(model.parameters()).device
    was_training, usual = model.training, model.policy
    model.train(False)
    model.policy = policy
    loads, nlls, scored, concentrations, routes = [], [], [], [], []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for batch in windows:
                out, targets = model(batch.tokens.to(device), mode), batch.targets.to(device)
                num_experts = out.concentration.shape[-1]
                weights = (
                    out.route
                    if out.route.is_floating_point()
                    else F.one_hot(out.route, num_experts)
                )
                loads.append(weights.double().mean((2, 3)))  # [L, B, E], of [L, B, T, R, E]
                nlls.append(token_nll(out.logits, targets).double().sum(1))
                scored.append((targets != IGNORED).sum(1).double())
                concentrations.append(out.concentration)
                routes.append(out.route)
    finally:
        model.train(was_training)
        model.policy = usual
    load, route = torch.cat(loads, 1).mean(1).cpu(), torch.cat(routes, 1)
    reading = Executed(
        price, cost_of(route, load, cost), load, torch.cat(nlls).cpu(), torch.cat(scored).cpu()
    )
    return ExecutedPass(reading, torch.cat(concentrations, 1), route)


def cost_of(route: Tensor, load: Tensor, cost: Tensor | CountedCost) -> float:
    """What executed routes cost, whose shares are `load` [L, E]."""
    if not isinstance(cost, Tensor):
        return cost(route)
    fits = cost.shape in (load.shape, load.shape[1:])
    require(
        fits,
        "cost_ratio",
        f"one number for each of {load.shape[1]} experts, or that in each layer",
        cost.tolist(),
    )
    return float((load * cost.to("cpu", torch.float64)).sum(-1).mean())
