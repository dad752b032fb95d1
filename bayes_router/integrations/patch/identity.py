"""Which model a patch was made for: its class, and numbers of each of its weights."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_router.integrations.patch.offload import weights

SAMPLES = 64  # numbers of each tensor that are kept


class Identity(NamedTuple):
    """What tells a model from others.

    In its own precision by a fingerprint, in another by numbers of its weights.

    Attributes:
        fingerprint: sha256 of the class, of the parameters' names and shapes, and of 64 numbers of
            each as bfloat16.
        samples: by name and shape, those numbers as they are.
    """

    fingerprint: str
    samples: dict[str, Tensor]

    def same(self, other: "Identity") -> bool:
        """Whether both are one model.

        Alike as bfloat16, or one a rounding of the other in the precisions that they have.
        """
        if self.fingerprint == other.fingerprint:
            return True
        if not self.samples or self.samples.keys() != other.samples.keys():
            return False
        pairs = [(mine, other.samples[name]) for name, mine in self.samples.items()]
        return any(x.dtype != y.dtype for x, y in pairs) and all(_rounded(x, y) for x, y in pairs)


def _rounded(x: Tensor, y: Tensor) -> bool:
    """Whether numbers of two precisions may be roundings of the same ones.

    Of one precision: whether they are the same.
    """
    if x.dtype == y.dtype:
        return torch.equal(x, y)
    kinds, a, b = (torch.finfo(x.dtype), torch.finfo(y.dtype)), x.double(), y.double()
    most = min(kind.max for kind in kinds)
    a, b = (z.clamp(-most, most) for z in (a, b))  # float16 overflows
    relative = sum(kind.eps for kind in kinds) / 2
    # between numbers too small to be normal
    absolute = sum(kind.smallest_normal * kind.eps for kind in kinds) / 2
    return bool(((a - b).abs() <= relative * torch.maximum(a.abs(), b.abs()) + absolute).all())


@torch.no_grad()
def identity(model: nn.Module) -> Identity:
    """Of a model where its weights lie, on any device."""
    digest, samples = hashlib.sha256(type(model).__name__.encode()), {}
    for name, parameter in weights(model):
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(
            0, max(flat.numel() - 1, 0), min(SAMPLES, flat.numel()), dtype=torch.float64
        ).long()
        key = f"{name}{tuple(parameter.shape)}"
        samples[key] = flat[index.to(flat.device)].cpu()
        digest.update(key.encode())
        digest.update(samples[key].to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return Identity(digest.hexdigest(), samples)
