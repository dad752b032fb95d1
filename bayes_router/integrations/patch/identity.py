"""Which model a patch was made for: its class, and a fingerprint of its weights that holds none."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_router.integrations.patch.offload import weights

SAMPLES = 64  # numbers of each tensor that are looked at
SIGNED = 4  # sums of them that are kept, each number with a sign of its own
FEWEST = 16  # of fewer numbers no sum is kept: with the signs known it would tell them


class Sums(NamedTuple):
    """What is kept of a tensor.

    Attributes:
        values: [SIGNED + 1] float64: sums over 64 of its numbers under fixed random signs, and the
            root of the sum of their squares.
        dtype: what the numbers had.
    """

    values: Tensor
    dtype: torch.dtype


class Identity(NamedTuple):
    """What tells a model from others.

    Attributes:
        fingerprint: sha256 of the class, of the parameters' names and shapes, and of 64 numbers of
            each as bfloat16.
        sums: by name and shape, so that a copy in another precision is known; see `Sums`.
        vocabulary: names of the weights that have a row for every token, where they are known.
    """

    fingerprint: str
    sums: dict[str, Sums]
    vocabulary: frozenset[str] = frozenset()

    def same(self, other: "Identity") -> bool:
        """Whether both are one model.

        Alike as bfloat16, or one a rounding of the other in the precisions that they have. Of a
        vocabulary that was resized no sum is compared.
        """
        if self.fingerprint == other.fingerprint:
            return True
        if not self.sums or not other.sums:
            return False
        resized = self.sums.keys() ^ other.sums.keys()
        grown = {key.partition("(")[0] for key in resized} <= self.vocabulary | other.vocabulary
        pairs = [(x, other.sums[key]) for key, x in self.sums.items() if key not in resized]
        apart = bool(resized) or any(x.dtype != y.dtype for x, y in pairs)
        return grown and apart and all(_rounded(x, y) for x, y in pairs)


def sums_of(samples: Tensor) -> Sums:
    """The sums of at most `SAMPLES` numbers of a tensor."""
    x = samples.detach().cpu().double()
    signs = torch.tensor([_signs(row) for row in range(SIGNED)], dtype=torch.float64)
    return Sums(torch.cat([signs[:, : len(x)] @ x, x.norm()[None]]), samples.dtype)


def _signs(row: int) -> list[float]:
    """`SAMPLES` random signs, the same for ever and everywhere."""
    bits = hashlib.sha256(f"signs {row}".encode()).digest()
    return [1.0 - 2.0 * (bits[i // 8] >> i % 8 & 1) for i in range(SAMPLES)]


def _rounded(x: Sums, y: Sums) -> bool:
    """Whether numbers of two precisions may be roundings of the same ones.

    Rounding moves a number w by at most e = u |w| + a, with u half of the precision's epsilon and a
    half of the distance between numbers too small to be normal. Under random signs a sum of moves
    exceeds t with a probability below 2 exp(-t^2 / 2 sum e^2) (Hoeffding 1963): at t = 7 |e| below
    5e-11, for each sum. Norms differ by at most |e|.
    """
    if x.dtype == y.dtype:
        return torch.equal(x.values, y.values)
    kinds = [torch.finfo(dtype) for dtype in (x.dtype, y.dtype)]
    norm = max(float(x.values[-1]), float(y.values[-1]))
    moved = sum(k.eps / 2 * norm + k.smallest_normal * k.eps / 2 * SAMPLES**0.5 for k in kinds)
    apart = (x.values - y.values).abs()
    return bool((apart[:-1] <= 7 * moved).all() and apart[-1] <= moved)


@torch.no_grad()
def identity(model: nn.Module) -> Identity:
    """The identity of a model, read where its weights lie, on any device."""
    digest, sums = hashlib.sha256(type(model).__name__.encode()), dict[str, Sums]()
    for name, parameter in weights(model):
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(
            0, max(flat.numel() - 1, 0), min(SAMPLES, flat.numel()), dtype=torch.float64
        ).long()
        key, samples = f"{name}{tuple(parameter.shape)}", flat[index.to(flat.device)].cpu()
        if len(samples) >= FEWEST:
            sums[key] = sums_of(samples)
        digest.update(key.encode())
        digest.update(samples.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return Identity(digest.hexdigest(), sums, frozenset(_by_token(model)))


def _by_token(model: nn.Module) -> Iterator[str]:
    """Names of the parameters of a Hugging Face model's embeddings."""
    getters = ("get_input_embeddings", "get_output_embeddings")
    found = [getattr(model, name)() for name in getters if hasattr(model, name)]
    for name, module in model.named_modules():
        if any(module is one for one in found):
            yield from (f"{name}.{parameter}" for parameter, _ in module.named_parameters())


def as_saved(sums: dict[str, Sums]) -> dict[str, Tensor]:
    """The sums as they are saved: the precision is part of the name."""
    return {
        f"{name}|{str(one.dtype).removeprefix('torch.')}": one.values for name, one in sums.items()
    }


def read_kept(saved: dict[str, Tensor]) -> dict[str, Sums]:
    """What `kept` saved.

    Patches of before hold the numbers themselves, by names without a precision.

    Raises:
        ValueError: they are neither.
    """
    found = {}
    for name, values in saved.items():
        key, known, kind = name.rpartition("|")
        if not known:
            if len(values) >= FEWEST:
                found[name] = sums_of(values)
            continue
        dtype = getattr(torch, kind, None)
        if not isinstance(dtype, torch.dtype) or values.shape != (SIGNED + 1,):
            raise ValueError(f"{name!r} of shape {tuple(values.shape)}")
        found[key] = Sums(values.double(), dtype)
    return found
