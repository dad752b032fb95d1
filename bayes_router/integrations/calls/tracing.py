"""What is being traced: by torch.compile, or for torch.export."""

import torch


def exporting() -> bool:
    """`torch.compiler.is_exporting()`, which Dynamo of torch 2.11 takes for True in any trace."""
    if torch.compiler.is_dynamo_compiling():
        return bool(getattr(torch.compiler, "_is_exporting_flag", False))
    return torch.compiler.is_exporting()


def traced() -> bool:
    """Whether torch.compile is tracing a pass without gradients."""
    return torch.compiler.is_dynamo_compiling() and not exporting() and not torch.is_grad_enabled()
