"""What can go wrong while training, and what is left then.

Steps that are not finite, signals, a folder in use.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from bayes_router.files import held
from bayes_router.routing.posterior import posterior_mean
from bayes_router.training.sharding import whole_model, whole_tensor
from bayes_router.transformer.model import RoutedLanguageModel


class TrainingDiverged(RuntimeError):
    """Loss or gradient are not finite, step after step; the last good checkpoint is kept."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C: the run was saved and can be resumed."""


class StepGuard:
    """Takes the optimiser's step where loss and gradient are finite.

    Steps that it skips are counted.

    On a GPU the decision stays on the device (the fused optimiser reads it there), so that no step
    waits for the host.

    Args:
        model: that is trained.
        max_skipped: steps in a row that may be skipped.
    """

    def __init__(self, model: RoutedLanguageModel, max_skipped: int):
        self.model, self.max_skipped = model, max_skipped
        device = next(model.parameters()).device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def step(self, optimiser: torch.optim.Optimizer, finite: Tensor) -> None:
        """Move the parameters if `finite`, bool []."""
        self.skipped += ~finite
        self.in_a_row = torch.where(finite, 0, self.in_a_row + 1)
        if optimiser.defaults.get("fused"):
            optimiser.found_inf = (~finite).float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
            optimiser.step()
        elif bool(finite):
            optimiser.step()

    def check(self, step: int, loss: Tensor, norm: Tensor, tokens: Tensor) -> None:
        """Stop where too many steps were skipped, or where weights are lost. Waits for the device.

        Raises:
            TrainingDiverged: the message names the step and the culprit.
        """
        in_a_row = int(self.in_a_row)
        if in_a_row == 0 or (in_a_row <= self.max_skipped and all_finite(self.model)):
            return
        culprit = find_culprit(whole_model(self.model), tokens)
        raise TrainingDiverged(
            f"step {step}: loss {float(loss):.4g}, gradient norm {float(norm):.4g}; {in_a_row} "
            f"steps in a row were skipped; "
            f"{culprit}; lower train.lr or raise model.concentration_floor"
        )

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": int(self.skipped), "in_a_row": int(self.in_a_row)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.skipped.fill_(int(state["skipped"]))
        self.in_a_row.fill_(int(state["in_a_row"]))


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter is; all ranks ask together where they are cut."""
    return all([bool(torch.isfinite(whole_tensor(p)).all()) for p in model.parameters()])


@torch.no_grad()
def find_culprit(model: RoutedLanguageModel, tokens: Tensor) -> str:
    """The first layer at which a pass on `tokens` is not finite, in words.

    With its range of concentrations.
    """
    lost = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    # of each layer: concentration from, to; whether its input is finite
    ranges: list[tuple[float, float, bool]] = []

    def route(layer: int, hidden: Tensor) -> Tensor:
        concentration = model.controller.posterior(layer, hidden).concentration
        ranges.append(
            (
                float(concentration.min()),
                float(concentration.max()),
                bool(torch.isfinite(hidden).all()),
            )
        )
        return posterior_mean(concentration)

    logits = model.network(tokens, route)
    words = [f"weights that are not finite: {', '.join(lost[:3])}"] if lost else []
    for layer, (low, high, finite) in enumerate(ranges):
        if not finite or not 0 < low <= high < float("inf"):
            what = "its concentrations" if finite else "its input"
            words.append(
                f"layer {layer} is the first where {what} are not finite (concentration {low:.3g} "
                f"to {high:.3g})"
            )
            return "; ".join(words)
    grads = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    if grads:
        words.append(f"gradients that are not finite: {', '.join(grads[:3])}")
    widest = max(range(len(ranges)), key=lambda layer: ranges[layer][1] / ranges[layer][0])
    low, high, _ = ranges[widest]
    words.append(f"logits are {'finite' if torch.isfinite(logits).all() else 'not finite'}")
    words.append(
        f"the widest range of concentrations is that of layer {widest} ({low:.3g} to {high:.3g})"
    )
    return "; ".join(words)


class StopRequest:
    """Notes SIGTERM and Ctrl-C while a run goes on, so that it ends between two steps.

    A second one ends it at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Python takes signals there alone
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._usual:
            signal.signal(*self._usual.popitem())

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()


@contextmanager
def sole_user(run: Path) -> Iterator[None]:
    """Hold a run folder: a second fit of it, in any process or thread, is refused.

    A killed process lets go by itself.

    Raises:
        ValueError: another fit holds it.
    """
    with held(run) as mine:
        if not mine:
            raise ValueError(
                f"out: expected a run folder that no other fit writes; {run} is in use; choose "
                f"another"
            )
        yield
