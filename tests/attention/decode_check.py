"""Decoding steps of a cache against the full pass in float64.

And against a store poisoned where no row needs it.
"""

import copy
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import Expert, Kernel
from bayes_router.attention.shapes import ExpertShape
from tests.attention.dense_check import draw_expert
from tests.attention.expert_contract import relative_error

DECODERS = [
    ("full", "gated", "local"),
    ("full", "linear", "local"),
    ("local", "gated", "linear", "full"),
    ("full", "local"),
    ("gated",),
    ("linear", "local"),
    ("gated", "full", "gated"),  # the second by its own pass
    ("full", "mapped", "local"),  # no kernel of its own for a step
]


class Inputs(NamedTuple):
    q: Tensor  # [B, H, T, Dh]
    k: Tensor  # [B, Hkv, T, Dh]
    v: Tensor
    plain_q: Tensor
    plain_k: Tensor

    def part(self, a: int, b: int) -> "Inputs":
        return Inputs(*(x[:, :, a:b] for x in self))


@dataclass
class Decoder:
    names: tuple[str, ...]
    B: int
    H: int
    Hkv: int
    Dh: int
    window: int
    capacity: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    units: int = 1

    def __post_init__(self) -> None:
        shape = ExpertShape(self.H, self.Dh, self.window)
        self.experts: tuple[Expert, ...] = tuple(
            draw_expert(name, shape, self.device) for name in self.names
        )
        for index, expert in enumerate(self.experts):  # two of a kind are not the same
            for parameter in expert.parameters():
                parameter.data += 0.3 * index

    def cache(self) -> LayerCache:
        return LayerCache(
            self.experts, self.B, self.capacity, self.Hkv, device=self.device, dtype=self.dtype
        )

    def draw(self, T: int, seed: int = 0) -> Inputs:
        """Laid out as a model's: [B, T, H, Dh] in memory."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.H, self.Hkv, self.Hkv, self.H, self.Hkv)
        drawn = (torch.randn(self.B, T, h, self.Dh, generator=generator) for h in heads)
        return Inputs(*(x.to(self.device, self.dtype).transpose(1, 2) for x in drawn))

    def routes(self, T: int) -> Tensor:
        """[B, T, R]: rows and units on different experts, another at every token."""
        rows = (
            torch.arange(self.B)[:, None, None]
            + torch.arange(T)[:, None]
            + torch.arange(self.units)
        )
        return (rows % len(self.experts)).to(self.device)

    def exact(self, inputs: Inputs, route: Tensor, row: int, length: int) -> Tensor:
        """[H, length, Dh] of one row alone, in float64."""
        q, k, v, pq, pk = (x[row : row + 1, :, :length].double() for x in inputs)
        out = torch.zeros_like(q)
        for index, expert in enumerate(self.experts):
            rows = copy.deepcopy(expert).double()(*((q, k) if expert.rotary else (pq, pk)), v)
            of_unit = (route[row, :length] == index).mT  # [R, length]
            out = torch.where(
                of_unit.repeat_interleave(self.H // self.units, 0)[None, ..., None], rows, out
            )
        return out[0]


def feed(
    cache: LayerCache, inputs: Inputs, route: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    q, k, v, pq, pk = inputs
    route = (
        torch.zeros(len(q), q.shape[2], 1, dtype=torch.int64, device=q.device)
        if route is None
        else route
    )
    return cache.attend(q, k, v, route, linear_q=pq, linear_k=pk, lengths=lengths)


def per_row(inputs: Inputs, starts: Tensor, T: int) -> Inputs:
    """Tokens starts[b] .. starts[b] + T - 1 of each row."""
    index = (starts[:, None] + torch.arange(T, device=starts.device))[:, None, :, None]
    return Inputs(*(x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in inputs))


def prefilled(
    decoder: Decoder, inputs: Inputs, route: Tensor, prompts: tuple[int, ...]
) -> LayerCache:
    """Right-padded prompts of these lengths; what stands on the padding is large."""
    cache, lengths = decoder.cache(), torch.tensor(prompts, device=decoder.device)
    longest = max(prompts)
    padding = torch.arange(longest, device=decoder.device) >= lengths[:, None]
    first = Inputs(
        *(x.masked_fill(padding[:, None, :, None], 1e4) for x in inputs.part(0, longest))
    )
    feed(cache, first, route[:, :longest], lengths)
    return cache


def steps_equal_the_full_pass(
    decoder: Decoder, prompts: tuple[int, ...], steps: int, tolerance: float
) -> None:
    total = max(prompts) + steps
    inputs, route = decoder.draw(total), decoder.routes(total)
    cache, got = prefilled(decoder, inputs, route, prompts), []
    for _ in range(steps):
        at = cache.lengths.clone()
        got.append(
            feed(
                cache,
                per_row(inputs, at, 1),
                route.gather(1, at[:, None, None].expand(-1, 1, decoder.units)),
            )
        )
    assert cache.lengths.tolist() == [n + steps for n in prompts]
    for b, n in enumerate(prompts):
        want = decoder.exact(inputs, route, b, n + steps)[:, n:]
        error = relative_error(torch.cat([x[b] for x in got], 1), want)
        assert error < tolerance, (b, error)


def needed_only(decoder: Decoder, prompts: tuple[int, ...], tolerance: float) -> None:
    """Keys and values that none of a row's own experts sees are NaN, by key head.

    Each step gives what it gave without.
    """
    steps, total = len(decoder.experts), max(prompts) + 1
    inputs, route = decoder.draw(total), decoder.routes(total)
    token = decoder.draw(1, seed=5)
    for step in range(steps):
        choice = decoder.routes(step + 1)[:, step:]
        cache, poisoned = (prefilled(decoder, inputs, route, prompts) for _ in range(2))
        poison(poisoned, choice[:, 0].tolist())  # [B][R]
        want, got = feed(cache, token, choice), feed(poisoned, token, choice)
        assert got.isfinite().all()
        assert relative_error(got, want.double()) < tolerance


def poison(cache: LayerCache, choices: list[list[int]]) -> None:
    """NaN in every slot of a key head that none of its query heads sees.

    They see with the next token of the row.
    """
    if cache.values is None:
        return
    assert cache.keys is not None
    Hkv, H = cache.keys.shape[1], cache.experts[0].shape.num_heads
    for b, key_head in itertools.product(range(len(choices)), range(Hkv)):
        length, units = int(cache.lengths[b]), len(choices[b])
        heads = range(key_head * H // Hkv, (key_head + 1) * H // Hkv)
        firsts = [length]
        for expert in (cache.experts[choices[b][h * units // H]] for h in heads):
            if not expert.stateful:
                firsts.append(
                    length - expert.shape.window + 1 if expert.kernel is Kernel.LOCAL else 0
                )
        seen = torch.zeros(cache.slots + 1, dtype=torch.bool)
        seen[torch.arange(max(min(firsts), 0), length) % cache.slots] = True
        for store in (cache.keys, cache.values):
            store[b, key_head, ~seen] = torch.nan
