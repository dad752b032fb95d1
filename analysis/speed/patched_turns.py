"""Contenders of `analysis.speed.patched` that take turns, and their table."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from bayes_router.benchmark.rows import Rows
from bayes_router.timing import isolated_ms

LONG, FEW = 32_768, 3
"""Texts from so many tokens on take so many turns."""


@contextmanager
def only(backend: SDPBackend | None) -> Iterator[None]:
    """Torch's own choice, or one backend."""
    with ExitStack() as stack:
        if backend is not None:
            stack.enter_context(sdpa_kernel([backend]))
        yield


def nothing() -> None:
    """No preparation."""


class Timed(NamedTuple):
    """The share of its tokens on full, what is timed, and what is done before, which is not."""

    on_full: float
    call: Callable[[], object]
    prepare: Callable[[], object] = nothing


class Models(NamedTuple):
    """One shape twice, with the same weights; the second is patched."""

    plain: LlamaForCausalLM
    model: LlamaForCausalLM


class Turns:
    """Contenders that take turns, and the table."""

    def __init__(self, rows: Rows, turns: int, device: torch.device):
        self.rows, self.turns, self.device = rows, turns, device

    def group(
        self,
        facts: dict[str, Any],
        contenders: dict[str, Timed],
        bounds: dict[str, Timed] | None = None,
        turns: int | None = None,
    ) -> None:
        """Time the contenders, in `turns` of the usual number and at most so many times as many; a
        name that begins with `unpatched` is a rival.

        What `bounds` call answers how many milliseconds it cannot take less than.
        """
        able: dict[str, Callable[[], object]] = {}
        for name, contender in contenders.items():
            try:
                for _ in range(2):
                    contender.prepare()
                    contender.call()
                able[name] = contender.call
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                torch.cuda.empty_cache()
                print(f"{facts} {name}: left out, {str(error).splitlines()[0]}", flush=True)
        long = facts["what"] != "decode" and facts["context"] >= LONG
        number = min(self.turns, FEW) if long else min(turns or self.turns, self.turns * FEW)
        read: list[dict[str, float]] = [{} for _ in range(number)]
        for turn in read:
            for name, call in able.items():
                contenders[name].prepare()
                turn[name] = isolated_ms(call, self.device)[1]
        ms = {name: statistics.median(turn[name] for turn in read) for name in able}
        best = min((name for name in ms if name.startswith("unpatched")), key=ms.__getitem__)
        for name, bound in (bounds or {}).items():
            ms[name] = least = float(bound.call())  # type: ignore[arg-type]
            for turn in read:
                turn[name] = least
        for name, value in ms.items():
            ratios = [turn[name] / turn[best] for turn in read]
            low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
            row = {
                **facts,
                "contender": name,
                "on_full": {**contenders, **(bounds or {})}[name].on_full,
                "ms": value,
                "ratio": ratio,
                "low": low,
                "high": high,
                "best": best,
            }
            self.rows.add(row)


def replayed(
    call: Callable[[], object], back: Callable[[], object] = nothing
) -> Callable[[], object]:
    """The same from a CUDA graph; `back` undoes what a call counts."""
    for _ in range(2):
        call()
        back()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def whole(model: LlamaForCausalLM) -> Any:
    """By torch.compile, without a break in its graph."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(model, fullgraph=True, dynamic=False)
