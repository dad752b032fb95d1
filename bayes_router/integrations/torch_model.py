"""What `patch` returns for PyTorch modules: fitted, and set to a budget, by inputs one gives."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_router.checks import positive
from bayes_router.integrations.calls.call import AttentionCall
from bayes_router.integrations.patch.distil import distillation_errors
from bayes_router.integrations.patch.routed import RoutedModel
from bayes_router.integrations.torch_inputs import FrozenUnits, Inputs, Loss, arguments, freeze
from bayes_router.routing.policy import at_price
from bayes_router.training.dial import TOLERANCE, Dial
from bayes_router.types import RoutingMode


class RoutedTorch(RoutedModel):
    """A patched PyTorch module; see `RoutedModel`. Calling it calls the module.

    In training mode draws carry gradients to the controllers, so that task loss + weight * `kl()`
    is a negative ELBO. A mixture of experts has no attention weights: where tokens are routed, in
    training mode hence always, a bare `nn.MultiheadAttention` is called with need_weights=False
    (its own default is True).
    """

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module itself."""
        self.require_patched()
        return self.model(*inputs, **named)

    def distil(self, inputs: Iterable[Any], lr: float = 1e-3) -> list[float]:
        """Teach each linear expert its own layer's attention, one step an input.

        Relative squared errors over real tokens, mean over layers.
        """
        parameters = [p for layer in self.layers for p in layer.parameters()]
        if not parameters:
            return []
        optimiser, losses = torch.optim.Adam(parameters, lr=lr), []

        def compare(index: int, call: AttentionCall, hidden: Tensor) -> None:
            errors.extend(distillation_errors(self.layers[index], call))

        with self.only_this():
            for x in inputs:
                errors: list[Tensor] = []
                with torch.no_grad(), self.observed_by(compare):
                    self.model(*arguments(x))
                loss = torch.stack(errors).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
        return losses

    def fit(
        self,
        inputs: Sequence[Any],
        loss: Loss | None = None,
        *,
        kl_weight: float = 3e-3,
        lr: float = 3e-3,
    ) -> list[float]:
        """Fit controllers and experts by SVI, one step an input.

        Minimise loss(model(x)) + kl_weight * kl over draws of routes.

        Args:
            inputs: what the module is called with, a tensor or a tuple of arguments each.
            loss: of the module's output, a mean; by default the squared distance from the original
                module's output, over real tokens where that is one row a token.
            kl_weight: of the KL, nats per token.
            lr: learning rate of Adam.
        """
        self.require_patched()
        self.require_thawed("fit")
        positive("kl_weight", kl_weight)
        optimiser, losses = torch.optim.Adam(self.parameters(), lr=lr), []
        with self.forced_to(None, RoutingMode.SAMPLE), self.only_this():
            for x in inputs:
                target = self.original(x)
                out = self.model(*arguments(x))
                task = loss(out) if loss is not None else self.distance(out, target)
                optimiser.zero_grad()
                (task + kl_weight * self.kl()).backward()
                optimiser.step()
                losses.append(float(task.detach()))
        return losses

    def set_budget(
        self, budget: float, inputs: Sequence[Any], *, tolerance: float = TOLERANCE
    ) -> float:
        """Let executed attention cost `budget` of attention over all keys, on these inputs.

        Afterwards `policy` is a `Budget` at the price that was found.

        Args:
            budget: full attention = 1, by the costs of `settings.context` tokens.
            inputs: what the module is called with, a tensor or a tuple of arguments each; every
                real token of them counts alike.
            tolerance: how far from the budget a cost may be where many tokens have one posterior,
                so that no price comes within 0.005.

        Returns:
            The executed cost on these inputs, within 0.005 of the budget, or within `tolerance` in
            such a jump.

        Raises:
            ValueError: no input, or a budget that no price realises; the message names what is
                within reach.
        """
        self.require_patched()
        read = Inputs(self, inputs)
        policy = at_price("argmax", self.cost_ratio.tolist())
        dial = Dial(
            read, read, read.cost, context=1, batch_size=1, policy=policy, experts=self.experts
        )
        found = dial.solve(budget, jump=max(tolerance, TOLERANCE))
        self.policy = dial.policy(found.price)
        return found.cost

    def freeze(
        self, inputs: Sequence[Any], *, share: float = 0.01, loss: Loss | None = None
    ) -> FrozenUnits:
        """Make static the units that the policy of now sends to one expert, but for `share`.

        Their controllers are not run any more. A module keeps no cache, so that no memory is freed.

        Args:
            inputs: two or more, that `fit` did not read; the first half chooses the units, the
                other tells what it costs.
            share: of the real tokens, below a half.
            loss: of the module's output, as in `fit`.

        Returns:
            What was frozen and what it costs. `thaw()` takes it back; `save` keeps it.

        Raises:
            ValueError: less than two inputs, or a share that is out of range.
        """
        self.require_patched()
        return freeze(self, inputs, share, loss)

    @torch.no_grad()
    def original(self, x: Any) -> Any:
        """What the module says of an input where every token is on `full`: as before the patch."""
        with self.forced_to("full"):
            return self.model(*arguments(x))

    def distance(self, out: Any, target: Any) -> Tensor:
        """Mean squared distance of the output from the original's.

        Of rows of tokens, over the real ones.
        """
        # without attention weights
        out, target = (x[0] if isinstance(x, tuple) else x for x in (out, target))
        distance: Tensor = (out - target).square()
        last, by_row = self.last, getattr(self.found[0].module, "batch_first", True)
        real = last.real.get(0)
        if real is not None and distance.dim() > 2:
            of_batch = distance if by_row else distance.transpose(0, 1)
            if of_batch.shape[1] == real.shape[1] and real.shape[0] in (1, of_batch.shape[0]):
                return last.mean(0, of_batch)
        return distance.mean()
