"""A patched model as a dial turns it: its own posteriors decide, whatever it is forced to."""

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from torch import nn

from bayes_router.routing.policy import Policy

RouterT = TypeVar("RouterT", bound=Any)


class Turned(Generic[RouterT]):
    """What is asked of a router whose policy is tried: policy, mode, parameters."""

    def __init__(self, router: RouterT):
        self.router = router

    @property
    def policy(self) -> Policy:
        """The router's."""
        policy: Policy = self.router.policy
        return policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.router.policy = policy

    @property
    def training(self) -> bool:
        """The model's mode."""
        return bool(self.router.training)

    @training.setter
    def training(self, mode: bool) -> None:
        self.router.train(mode)

    def train(self, mode: bool = True) -> Any:
        """Set the model's mode."""
        return self.router.train(mode)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What was added: where the model runs, also where its weights are offloaded."""
        self.router.follow()
        parameters: Iterator[nn.Parameter] = self.router.parameters()
        return parameters
