"""A policy that spends more on text unlike the fit's: the guard.

In each layer a running mean of log evidence over the last tokens, `m[t]`, is held against two
levels:

    alarm[t] = m[t] < level,  or  alarm[t - 1] and m[t] < release        level <= release

Under alarm a token takes the refuge (full attention, of a patch), else what the posterior says at
the guard's price. Two levels, not one, keep a text near the level from switching at every token.
Nothing depends on later tokens, so that decoding step by step decides as one pass does. A text
begins as though a few tokens like the fit's stood before it: one odd token is no alarm. Where what
was seen of a text is gone (its cache was cropped, reordered or copied), the guard does not know,
and takes the refuge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.routing.evidence import Evidence
from bayes_router.routing.policy import Budget, Costs, Policy, register_policy
from bayes_router.routing.watch import RunningMean

BEFORE = 0.25
"""Share of the memory that stands before a text, as tokens of the usual evidence."""


@register_policy("guard")
@dataclass(frozen=True)
class Guard:
    """argmax of log posterior mean - price x cost.

    On text unlike the fit's every token on the refuge.

    Attributes:
        cost_ratio: of the experts.
        refuge: index of the expert that foreign text takes.
        usual: [L], mean log evidence of text like the fit's.
        level: [L], mean log evidence of the last tokens below which the alarm goes on.
        release: [L], above which it goes off again; at least `level`.
        memory: tokens over which the mean forgets.
        price: nats per unit of cost ratio, where there is no alarm.
    """

    cost_ratio: Costs
    refuge: int
    usual: tuple[float, ...]
    level: tuple[float, ...]
    release: tuple[float, ...]
    memory: int = 128
    price: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require(self.memory >= 1, "policy.memory", "at least 1 token", self.memory)
        layers = len(self.usual)
        same = len(self.level) == len(self.release) == layers
        require(same, "policy.level", f"as many as usual and release, {layers}", len(self.level))
        ordered = all(low <= high for low, high in zip(self.level, self.release, strict=True))
        require(ordered, "policy.release", "at least the level of each layer", self.release)

    def __call__(self, concentration: Tensor, alarm: Tensor | None = None) -> Tensor:
        """Concentration [..., R, E] and alarm bool, [...] -> int64 [..., R].

        Without an alarm as `Budget`.
        """
        choice = Budget(self.cost_ratio, self.price)(concentration)
        return choice if alarm is None else torch.where(alarm[..., None], self.refuge, choice)

    def alarm(
        self,
        layer: int,
        log_evidence: Tensor,
        before: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Whether each token is under alarm, and what decoding goes on from.

        Args:
            layer: whose levels hold.
            log_evidence: [B, T], of each token.
            before: [B, 3], what the last call returned of these texts; None: they begin here.
            real: [B or 1, T], False on padding.

        Returns:
            Alarm bool [B, T], and the state [B, 3]: sum, sum of weights, alarm.
        """
        B, T = log_evidence.shape
        if before is None:
            weight = self.memory * BEFORE
            before = log_evidence.new_tensor([weight * self.usual[layer], weight, 0.0]).expand(B, 3)
        mean = RunningMean(self.memory, before[:, :2].T)
        recent = mean(log_evidence, real)
        counts = torch.ones_like(recent, dtype=torch.bool) if real is None else real.expand(B, T)
        on = _last(counts & (recent < self.level[layer]), before[:, 2] > 0)
        off = _last(counts & (recent >= self.release[layer]), before[:, 2] <= 0)
        alarm = on > off
        assert mean.state is not None
        return alarm, torch.cat([mean.state.T, alarm[:, -1:].to(recent)], 1)


def _last(happened: Tensor, before: Tensor) -> Tensor:
    """When something happened last, [B, T]: the index of a token.

    -1 before the first one, -2 never.
    """
    step = torch.arange(happened.shape[1], device=happened.device)
    first = torch.where(before, -1, -2)[:, None]
    return torch.maximum(torch.where(happened, step, -2).cummax(1).values, first)


UNKNOWN = "unknown"
"""What a cache says of texts whose past the guard did not see."""


def guarded(
    policy: Policy,
    evidence: Evidence | None,
    layer: int,
    hidden: Tensor,
    past: Any = None,
    real: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The alarm of a layer under a policy, and what to remember for its next tokens.

    (None, None) of one that has none.

    Args:
        policy: any.
        evidence: the density beside the controller.
        layer: index.
        hidden: [B, T, D], what the controller reads.
        past: state of the last call; None where texts begin; `UNKNOWN`.
        real: [B or 1, T], False on padding.

    Raises:
        ValueError: a guard, and a fit without evidence.
    """
    if not isinstance(policy, Guard):
        return None, None
    if evidence is None:
        raise ValueError(
            "policy: expected evidence beside a guard; got a fit without; make it from text like "
            "the fit's: fit_evidence(texts)"
        )
    layers = len(evidence.layers)
    require(
        len(policy.level) == layers,
        "policy.level",
        f"one for each of {layers} layers",
        len(policy.level),
    )
    if past is UNKNOWN:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device), None
    return policy.alarm(layer, evidence.log_evidence(layer, hidden.detach()), past, real)


def levels(
    recent: Tensor, share: float, release: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Level and release of each layer so that `share` of the fit's tokens fall below.

    Args:
        recent: [L, N], running means on text like the fit's.
        share: of these tokens, below the level.
        release: of these tokens, below the release.
    """
    found = torch.quantile(
        recent.double(), torch.tensor([share, max(share, release)], dtype=torch.float64), dim=1
    )
    return _numbers(found[0]), _numbers(found[1])


def _numbers(values: Tensor | Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, values))
