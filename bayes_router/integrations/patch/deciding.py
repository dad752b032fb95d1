"""Which expert a token of a patched model takes, once its controller was read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributions import Dirichlet

from bayes_router.checks import require
from bayes_router.config import ModelConfig
from bayes_router.integrations.patch.following import Following
from bayes_router.integrations.patch.passes import Here, Pass
from bayes_router.integrations.patch.settings import RouterConfig
from bayes_router.routing.force import Force, forced_route
from bayes_router.routing.guard import UNKNOWN, Guard, guarded
from bayes_router.routing.policy import Policy, execute
from bayes_router.transformer.frozen import Frozen, posterior
from bayes_router.types import RoutingMode


class Deciding(Following):
    """A posterior, what its policy makes of it, and the units whose route is static."""

    settings: RouterConfig
    cost_ratio: Tensor
    policy: Policy
    here: Here
    config: ModelConfig
    frozen: Frozen | None = None
    mode: RoutingMode | str | None = None
    _force: Force | None = None
    # [E], and of the layers whose costs are not those, as they slide already
    _usual_costs: tuple[float, ...]
    _own_costs: dict[int, tuple[float, ...]]

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in the order of the routing latent."""
        return self.settings.experts

    def force(self, force: Force | None) -> None:
        """Send every token to one expert (its name), or where choices [L, B, T, R] or weights say.

        None: route again.
        """
        if force is not None:
            forced_route(force, self.experts, len(self.layers), self.config.num_units)
        self._force = force

    @property
    def forced(self) -> bool:
        """Whether `force` was told where tokens go."""
        return self._force is not None

    @contextmanager
    def forced_to(
        self, force: Force | None, mode: RoutingMode | str | None = None
    ) -> Iterator[None]:
        """`force`, and `mode` where one is given, inside the block; then as before."""
        before = self._force, self.mode
        self.force(force)
        self.mode = before[1] if mode is None else mode
        try:
            yield
        finally:
            self._force, self.mode = before

    @property
    def last(self) -> Pass:
        """How this thread's last pass was routed.

        A handle, with the graph that `kl` needs until the pass went backward.
        """
        return self.here.slot.last

    def posterior(self, index: int, hidden: Tensor) -> Dirichlet:
        """The posterior of a layer's routes for what its controller reads, [B, T, D].

        Frozen units are not computed, and near certain.
        """
        return posterior(self.controller, self.frozen, index, hidden, len(self.experts))

    def thaw(self) -> None:
        """Let every unit choose again. A cache that was freed stays so: read its text anew."""
        self.frozen = None

    def require_thawed(self, what: str) -> None:
        """ValueError where units are frozen, which have no posterior."""
        got = None if self.frozen is None else f"{self.frozen.number} frozen"
        require(got is None, what, "units that all choose", got, "call thaw() first")

    def decide(self, index: int, q: Dirichlet, mode: RoutingMode, hidden: Tensor) -> Tensor:
        """The route that a layer executes for what its controller reads.

        A policy that knows costs is told the layer's own.
        """
        alarm = self._alarm(index, hidden) if mode is RoutingMode.HARD else None
        executed = execute(q, mode, self._policy_of(index), alarm)
        return executed if self.frozen is None else self.frozen.fix(index, executed)

    def _policy_of(self, index: int) -> Any:
        policy: Any = self.policy
        known = getattr(policy, "cost_ratio", None)
        if index in self._own_costs and known == self._usual_costs:
            policy = replace(policy, cost_ratio=self._own_costs[index])
        return policy

    def _alarm(self, index: int, hidden: Tensor) -> Tensor | None:
        """Which tokens [B, T] a guard is alarmed by.

        Its memory of the texts goes with the cache of the call under way.
        """
        if not isinstance(self.policy, Guard):
            return None
        call, past = self.here.call, None
        memory = None if call is None else call.memory
        if memory is not None:
            past = None if memory.begins else UNKNOWN if memory.beside is None else memory.beside
        elif call is not None and call.causal and call.q.shape[2] < call.k.shape[2]:
            past = UNKNOWN  # a cache that nothing can be kept beside
        alarm, state = guarded(
            self.policy, self.controller.evidence, index, hidden, past, self.last.real.get(index)
        )
        if memory is not None:
            memory.beside = state
        return alarm
