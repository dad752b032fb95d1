"""What a benchmark was read with: the command, versions, and the packages that it needs."""

import sys
from pathlib import Path

import torch


def drawing_packages() -> None:
    """Raise a ValueError with the fix where pandas or seaborn is missing."""
    try:
        import pandas  # noqa: F401
        import seaborn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"bench: expected the packages pandas and seaborn; got: {error}; run: pip install "
            f"seaborn"
        ) from None


def command_line() -> str:
    """The command that was typed, with programs by their names alone."""
    name = Path(sys.argv[0]).name
    known = {
        "kernels.py": "python -m analysis.speed.kernels",
        "speed_model.py": "python -m analysis.speed.speed_model",
    }
    return " ".join([known.get(name, "bayes-router"), *sys.argv[1:]])


def versions(device: torch.device) -> str:
    """The versions of Python, torch and what its kernels are made with."""
    parts = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
        try:
            import triton

            parts.append(f"triton {triton.__version__}")
        except ImportError:
            parts.append("no triton")
    return ", ".join(parts)
