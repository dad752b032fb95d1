"""Setting a guard: where its levels lie.

Text like the fit's is to cost at most so much more, by a stated confidence.

The levels of all layers are one quantile of their running means on calibration text. Of a grid of
quantiles the highest is taken at which the added cost stays below what may be spent, by the bound
of Student's t over windows, as in `guarantee`. First by the alarms that it would have raised on
that text as the bare policy reads it, then as it is executed: what a token takes changes what later
layers read, which may raise alarms there. It holds for text like that; what the guard then does to
other text is read, not promised.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.checks import between, require
from bayes_router.data.tokens import Batch
from bayes_router.routing.guard import BEFORE, Guard, levels
from bayes_router.routing.policy import Argmax, Budget, Policy
from bayes_router.routing.watch import RunningMean, evidence_of, inputs_of
from bayes_router.training.executed import Routed, execute
from bayes_router.training.guarantee import LEAST_WINDOWS, upper_bound
from bayes_router.types import RoutingMode

# of tokens below the level, from a fifth down to less than 1 in 10,000
SHARES = tuple(0.2 * 0.8**i for i in range(36))
RELEASE = 4.0  # the release is the quantile of four times the share


class Guarded(NamedTuple):
    """A guard that was set, and what it costs on the calibration text."""

    policy: Guard
    share: float  # of tokens below the level, in each layer
    bare: float  # executed cost without the guard, full attention = 1
    cost: float  # executed cost with it
    bound: float  # share of cost that it adds at most, with the confidence
    windows: int

    def __str__(self) -> str:
        return (
            f"guard: executed cost {self.cost:.4f}, {self.bare:.4f} without; at most "
            f"{self.bound:.2%} more on text like this "
            f"({self.windows} windows)"
        )


def price_of(policy: Policy) -> float:
    """The price of a policy that a guard can stand before.

    Raises:
        ValueError: it is none of argmax, budget and guard.
    """
    known = isinstance(policy, Argmax | Budget | Guard)
    require(
        known,
        "policy",
        "argmax, a budget or a guard, to stand a guard before",
        type(policy).__name__,
        "set_budget first",
    )
    return float(getattr(policy, "price", 0.0))


@torch.no_grad()
def set_guard(
    model: Routed,
    controller: Any,
    windows: Sequence[Batch],
    cost: Tensor,
    refuge: int,
    spend: float = 0.01,
    confidence: float = 0.95,
) -> Guarded:
    """Put a guard before the policy of `model`, at the price that it has.

    Args:
        model: a fitted model, or a patched one as `Unforced` shows it.
        controller: of it, with evidence.
        windows: of text like the fit's that the fit did not read.
        cost: [E] or [L, E], full = 1.
        refuge: index of the expert that foreign text takes.
        spend: share by which text like the fit's may cost more.
        confidence: of that.

    Raises:
        ValueError: no evidence, too few windows, levels outside (0, 1), or a policy without a
            price.
    """
    between("spend", spend, "a share of cost between 0 and 1")
    between("confidence", confidence, "a probability between 0 and 1")
    evidence, price = evidence_of(controller), price_of(model.policy)
    policy: Policy = Budget(_mean_cost(cost), price)
    logs, added, bare = [], [], []
    for batch in windows:
        with inputs_of(controller) as inputs:
            found = execute(model, [batch], cost, RoutingMode.HARD, policy, price)
        logs.append(
            torch.stack([evidence.log_evidence(i, hidden).cpu() for i, hidden in enumerate(inputs)])
        )
        of_token = _costs(found.route, cost)  # [L, B, T]
        bare.append(of_token)
        added.append(_refuge_cost(cost, refuge, len(of_token)) - of_token)
    log, more, paid = (torch.cat(parts, 1) for parts in (logs, added, bare))  # [L, W, T]
    W = log.shape[1]
    require(W >= LEAST_WINDOWS, "texts", f"at least {LEAST_WINDOWS} windows", W, "give more text")
    usual, memory = log.mean((1, 2)), evidence.memory
    recent = torch.stack([_means(log[i], float(usual[i]), memory) for i in range(len(log))])
    for share in SHARES:
        level, release = levels(recent.flatten(1), share, min(RELEASE * share, 0.5))
        guard = Guard(
            _mean_cost(cost), refuge, tuple(map(float, usual)), level, release, memory, price
        )
        alarm = torch.stack([guard.alarm(i, log[i])[0] for i in range(len(log))])
        foreseen = upper_bound(_extra(alarm * more, paid), confidence)
        if foreseen > spend and share != SHARES[-1]:
            continue
        run = [
            execute(model, [batch], cost, RoutingMode.HARD, guard, price).route for batch in windows
        ]
        executed = torch.cat([_costs(route, cost) for route in run], 1)
        bound = upper_bound(_extra(executed - paid, paid), confidence)
        if bound <= spend:
            break
    model.policy = guard
    return Guarded(guard, share, float(paid.mean()), float(executed.mean()), bound, W)


def _extra(more: Tensor, paid: Tensor) -> Tensor:
    """The share by which each window costs more, [W], of costs [L, W, T]."""
    return (more.mean((0, 2)) / paid.mean()).double()


def _mean_cost(cost: Tensor) -> tuple[float, ...]:
    return tuple(map(float, cost if cost.dim() == 1 else cost.mean(0)))


def _costs(route: Tensor, cost: Tensor) -> Tensor:
    """Of hard routes [L, B, T, R]: [L, B, T], the mean over units."""
    weights = F.one_hot(route.cpu(), cost.shape[-1]).double().mean(3)
    by_layer = cost.cpu().double().expand(len(route), -1)
    return torch.einsum("lbte,le->lbt", weights, by_layer)


def _refuge_cost(cost: Tensor, refuge: int, layers: int) -> Tensor:
    return cost.cpu().double().expand(layers, -1)[:, refuge, None, None]


def _means(log: Tensor, usual: float, memory: int) -> Tensor:
    """The running means [W, T] of a layer, as a guard takes them from the beginning of a text."""
    weight = memory * BEFORE
    start = log.new_tensor([[weight * usual], [weight]]).expand(2, len(log))
    return RunningMean(memory, start)(log)
