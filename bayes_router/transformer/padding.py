"""Right padding: which tokens are real, and checks of tokens and lengths."""

import torch
from torch import Tensor

from bayes_router.checks import require


def real_tokens(lengths: Tensor, T: int) -> Tensor:
    """[B, T] bool, False on the right padding of rows of `lengths` [B]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def check_tokens(
    tokens: Tensor, vocab_size: int, device: torch.device | None = None, name: str = "tokens"
) -> None:
    """Refuse what is not a batch of token ids.

    Values are read on the CPU alone: on a GPU it would wait for the device.
    """
    require(isinstance(tokens, Tensor), name, "a tensor, int64 [B, T]", type(tokens).__name__)
    require(tokens.dim() == 2, name, "shape [B, T]", tuple(tokens.shape))
    require(tokens.dtype == torch.int64, name, "torch.int64", tokens.dtype)
    require(tokens.numel() > 0, name, "at least one row and one token", tuple(tokens.shape))
    if device is not None and tokens.device != device:
        raise ValueError(
            f"{name}: expected the device of the model, {device}; got {tokens.device}; move one "
            f"with .to(device)"
        )
    if tokens.device.type == "cpu":
        low, high = (int(x) for x in tokens.aminmax())
        require(
            low >= 0 and high < vocab_size,
            name,
            f"ids from 0 to {vocab_size - 1}",
            (low, high),
            "check the tokeniser",
        )


def check_lengths(lengths: Tensor, tokens: Tensor, least: int = 0) -> None:
    """Refuse what does not count the real tokens of the rows of `tokens` [B, T].

    Values are read on the CPU alone.
    """
    (B, T), wanted = (
        tokens.shape,
        f"int64 or int32 of shape {(tokens.shape[0],)} on {tokens.device}",
    )
    require(isinstance(lengths, Tensor), "lengths", wanted, type(lengths).__name__)
    fits = (
        lengths.dtype in (torch.int64, torch.int32)
        and lengths.shape == (B,)
        and lengths.device == tokens.device
    )
    if not fits:
        raise ValueError(
            f"lengths: expected {wanted}; got {lengths.dtype} of shape {tuple(lengths.shape)} on "
            f"{lengths.device}"
        )
    if lengths.device.type == "cpu" and B:
        low, high = (int(x) for x in lengths.aminmax())
        require(low >= least and high <= T, "lengths", f"values in {least}..{T}", (low, high))


def last_token(x: Tensor, lengths: Tensor | None, dim: int = 1) -> Tensor:
    """The last real token of each row, the first if it has none: 1 along `dim`, the tokens.

    The batch stands before it.
    """
    if lengths is None:
        return x.narrow(dim, x.shape[dim] - 1, 1)
    at = (lengths - 1).clamp_min(0).to(torch.int64)  # [B]
    at = at.view(-1, *[1] * (x.dim() - dim))
    return x.gather(dim, at.expand(*x.shape[:dim], 1, *x.shape[dim + 1 :]))
