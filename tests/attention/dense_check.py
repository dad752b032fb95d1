"""An expert's own pass over every token against the same expert in float64.

Values and gradients, those of parameters too.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import relative_error


def draw_expert(name: str, shape: ExpertShape, device: str = "cpu") -> Expert:
    """With parameters away from where they start."""
    expert = expert_class(name)(shape)
    generator = torch.Generator().manual_seed(1)
    for parameter in expert.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return expert.to(device)


def draw_inputs(
    B: int,
    H: int,
    Hkv: int,
    T: int,
    Dh: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as a model's: [B, T, H, Dh] in memory."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (
        torch.randn(B, T, heads, Dh, generator=generator).to(device, dtype)
        for heads in (H, Hkv, Hkv)
    )
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in drawn)
    return q, k, v


def errors(
    expert: Expert,
    inputs: tuple[Tensor, Tensor, Tensor],
    run: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Relative errors of the output of `run` (default: the expert) and of the gradients.

    Gradients of q, k, v and of all parameters.
    """
    true, exact = (
        copy.deepcopy(expert).double(),
        [x.detach().double().requires_grad_() for x in inputs],
    )
    got, want = (run or expert)(*inputs), true(*exact)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(3)).to(got.device)
    own, known = list(expert.parameters()), list(true.parameters())
    grads = torch.autograd.grad((got * weight).sum(), [*inputs, *own])
    truths = torch.autograd.grad((want * weight.double()).sum(), [*exact, *known])
    beside = truths[2], 1.0 if inputs[0].shape[2] == 1 else 0.05
    found = {
        name: relative_error(g, t, *beside)
        for name, g, t in zip("qkv", grads[:3], truths[:3], strict=True)
    }
    if own:
        found["parameters"] = relative_error(
            *(torch.cat([x.flatten() for x in xs[3:]]) for xs in (grads, truths)), *beside
        )
    return {"out": relative_error(got, want), **found}
