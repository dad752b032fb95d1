"""What a route by token and query head is compared with.

Choices that no token moves, and how others make them.
"""

import time
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.pretrained.retrieval import Haystack, prompts
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.routing.controller import LayerController


def blind(router: RoutedPretrained) -> None:
    """Let the controllers' biases alone be fitted: a choice by unit that no token moves."""
    for controller in router.controller.layers:
        assert isinstance(controller, LayerController)
        controller.out.weight.register_hook(torch.zeros_like)


def choose_by(router: RoutedPretrained, score: Tensor) -> None:
    """Posteriors that no token moves, full before local, the highest score first.

    `score` is [L, R].
    """
    for controller, scores in zip(router.controller.layers, score, strict=True):
        assert isinstance(controller, LayerController)
        full = router.experts.index("full")
        raw = torch.zeros(controller.num_units, len(router.experts))
        raw[:, full] = scores
        with torch.no_grad():
            controller.out.weight.zero_()
            controller.out.bias.copy_(raw.flatten())


def passkeys(
    router: RoutedPretrained,
    hay: Haystack,
    context: int,
    seconds: float,
    steps: int,
    seed: int,
    lr: float = 0.02,
) -> list[float]:
    """Gates as DuoAttention fits them (Xiao et al. 2024, arXiv 2410.10819); the loss of each step.

    One gate a unit mixes full and local attention; the squared error of the last hidden state on
    the answers of synthetic passkeys, and 0.05 times the mean gate, are minimised. Units are then
    chosen by their gates. The window and the sinks are those of the study.
    """
    device = next(router.model.parameters()).device
    gates = nn.Parameter(torch.ones(len(router.layers), router.config.num_units, device=device))
    optimiser = torch.optim.AdamW([gates], lr=lr, weight_decay=0.0)
    base, full = router.model.get_submodule("model"), router.experts.index("full")
    sign = torch.full((len(router.experts),), -1.0, device=device)
    sign[full] = 1.0
    rest = 1 - F.one_hot(torch.tensor(full, device=device), len(router.experts)).float()

    def mixed(layer: int, hidden: Tensor) -> Tensor:
        weights = rest + sign * gates[layer][:, None]  # [R, E]
        return weights.expand(*hidden.shape[:2], -1, -1)

    losses, started, random = [], time.perf_counter(), Random(seed)
    with router.only_this():
        for step in range(steps):
            if (done := (time.perf_counter() - started) / seconds) >= 1:
                break
            optimiser.param_groups[0]["lr"] = lr * min(1.0, 5 * (1 - max(done, step / steps)))
            (asked,) = prompts("many needles", hay, context, 1, random.randrange(10**9))
            tokens = torch.tensor(asked.tokens, device=device)[None]
            with torch.no_grad(), router.routed_by(lambda layer, hidden: full):
                target = base(tokens, use_cache=False).last_hidden_state[:, -asked.answer :]
            with router.routed_by(mixed):
                got = base(tokens, use_cache=False).last_hidden_state[:, -asked.answer :]
            loss = F.mse_loss(got.float(), target.float()) + 0.05 * gates.abs().mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            losses.append(float(loss.detach()))
    # ties broken at random
    choose_by(router, gates.detach().cpu() + 1e-4 * torch.rand(gates.shape))
    return losses
