"""What is measured: inputs laid out as a model's, and routes drawn from a mix.

Beside them full attention to compare with, and ideals.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayes_router.attention.cost import Mode, hard_bytes, hard_flops
from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.hard.dispatch import EXPERTS
from bayes_router.attention.shapes import ExpertShape
from bayes_router.benchmark.clock import Thunk

WINDOW = 256
MIXES = ("10/60/30", "25/45/30", "50/30/20")


@dataclass(frozen=True)
class Shape:
    """Of one call: B rows, H heads, T tokens (in decoding, keys held), head size Dh."""

    B: int
    H: int
    T: int
    Dh: int

    def __str__(self) -> str:
        return f"B{self.B} H{self.H} T{self.T} Dh{self.Dh}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From BxHxTxDh, as 1x16x32768x64.

        Raises:
            ValueError: it is none.
        """
        sizes = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(f"shapes: expected BxHxTxDh, as 1x16x32768x64; got {text!r}")
        return cls(*sizes)


def mix_shares(mix: str) -> tuple[float, float, float]:
    """Shares of full, linear and local from percentages such as "10/60/30"."""
    if not re.fullmatch(r"\d+/\d+/\d+", mix) or sum(map(int, mix.split("/"))) != 100:
        raise ValueError(
            f"mixes: expected percentages FULL/LINEAR/LOCAL that add up to 100, as 10/60/30; got "
            f"{mix!r}"
        )
    full, linear, local = (int(part) / 100 for part in mix.split("/"))
    return full, linear, local


def draw_route(mix: str, B: int, T: int, run: int = 1) -> Tensor:
    """Routes [B, T] drawn from a mix: every token by itself, or `run` neighbours together."""
    shares = torch.tensor(mix_shares(mix))
    return (
        torch.multinomial(shares, B * -(-T // run), True)
        .view(B, -1)
        .repeat_interleave(run, 1)[:, :T]
    )


def draw_inputs(
    shape: Shape, device: torch.device, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a model: [B, T, H, Dh] in memory; bfloat16 on CUDA, float32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    B, H, T, Dh = shape.B, shape.H, shape.T, shape.Dh
    q, k, v = (
        torch.randn(B, T, H, Dh, device=device, dtype=dtype).transpose(1, 2).requires_grad_(grad)
        for _ in range(3)
    )
    return q, k, v


def built(shape: Shape) -> list[Expert]:
    """Full, linear and local."""
    return [expert_class(name)(ExpertShape(shape.H, shape.Dh, WINDOW)) for name in EXPERTS]


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None, causal: bool = True
) -> Tensor:
    """Fused full attention, by one of torch's kernels or its own choice."""
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


@cache
def baselines(device: torch.device) -> dict[str, SDPBackend | None]:
    """Every full attention worth comparing with; those that cannot run here are left out.

    Raises:
        ValueError: none can; there is nothing to compare with.
    """
    if device.type != "cuda":
        return {"full": None}
    known = {"full cudnn": SDPBackend.CUDNN_ATTENTION, "full flash": SDPBackend.FLASH_ATTENTION}
    found: dict[str, SDPBackend | None] = {}
    x = torch.zeros(1, 1, 64, 64, device=device, dtype=torch.bfloat16)
    for name, backend in known.items():
        try:
            full_attention(x, x, x, backend)
        except RuntimeError:  # this build of torch lacks it, or the device does
            continue
        found[name] = backend
    if not found:
        raise ValueError(
            f"device: expected one with cuDNN or flash attention; {device} has neither; choose "
            f"another"
        )
    return found


def ideal_flops(shape: Shape, mix: str) -> float:
    """FLOPs of full attention over those that hard routes of the mix have to do.

    States of every token are included.
    """
    cost = hard_flops(built(shape), shape.T, shape.H)
    return float(cost.own[0]) / cost.mean(torch.tensor(mix_shares(mix)))


def decode_calls(
    shape: Shape, mix: str, device: torch.device, run: int = 1
) -> tuple[dict[str, Thunk], float]:
    """One step of a batch in which every row takes its own expert.

    Beside it full attention over the same keys, and the ideal.

    With `run` above 1 rows of an expert stand together. The ideal is the bytes that full attention
    reads over those that the mix reads and writes. Keys beyond the step's own are never touched,
    and the cache forgets the step again, so that every turn is the same.
    """
    experts = built(shape)
    q, k, v = (x[:, :, :1] for x in draw_inputs(Shape(shape.B, shape.H, 1, shape.Dh), device))
    cache = LayerCache(experts, shape.B, shape.T + 64, shape.H, device=device, dtype=q.dtype)
    assert cache.keys is not None and cache.values is not None
    for store in (cache.keys, cache.values):
        store.normal_()
    cache.lengths.fill_(shape.T - 1)
    cache.longest = shape.T - 1
    counts = (torch.tensor(mix_shares(mix)) * shape.B).round().long()
    counts[1] += shape.B - counts.sum()
    route = torch.repeat_interleave(torch.arange(3), counts)
    route = (route if run > 1 else route[torch.randperm(shape.B)])[:, None].to(device)
    keys, values = cache.keys[:, :, : shape.T], cache.values[:, :, : shape.T]

    def step() -> Tensor:
        out = cache.attend(q, k, v, route)
        cache.lengths -= 1
        cache.longest -= 1
        return out

    calls: dict[str, Thunk] = {
        name: partial(full_attention, q, keys, values, backend, causal=False)
        for name, backend in baselines(device).items()
    }
    calls["cache"] = step
    cost = hard_bytes(experts, shape.T, shape.H, q.element_size(), Mode.DECODE)
    return calls, float(cost.own[0]) / cost.mean(counts / shape.B)
