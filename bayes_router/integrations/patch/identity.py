"""Which model a patch was made for: a fingerprint of its class and weights."""

import hashlib

import torch
from torch import nn

SAMPLES = 64  # numbers of each tensor that enter the fingerprint


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """sha256 of the model's class, of its parameters' names and shapes, and of 64 numbers of each as bfloat16.

    The same for a copy in another precision that holds the same bfloat16 values, and on another device.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(flat[index.to(flat.device)].to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
