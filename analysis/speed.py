"""Does hard routing save time and memory? `python -m analysis.speed [--quick] [--device D] [--out DIR]`.

One process; full attention and every routed variant take turns, medians are compared, sorting and gathering included. The
baseline is the fastest full attention of the device: the better of cuDNN and flash on CUDA, torch's SDPA on the CPU. Nothing is
timed before `verify` has found every backend equal to the float64 reference on this device. Writes one CSV and one figure.

On a CPU that other programs use too, `--cpu-time` counts the processor time of one thread instead of the clock on the wall.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis import speed_memory
from bayes_router.attention.cache import LayerCache
from bayes_router.attention.cost import Mode, flops, read_bytes, state_bytes
from bayes_router.attention.dispatch import EXPERTS, Backend, available_backends, routed_attention
from bayes_router.attention.expert import Expert, ExpertShape, expert_class
from bayes_router.attention.latency import device_name

WINDOW = 256
MIXES = {"10/60/30": (0.10, 0.60, 0.30), "25/45/30": (0.25, 0.45, 0.30), "50/30/20": (0.50, 0.30, 0.20)}
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Of one call."""

    B: int
    H: int
    T: int
    Dh: int


def draw_route(mix: str, B: int, T: int, run: int = 1) -> Tensor:
    """Routes [B, T] drawn from a mix: every token by itself, or `run` neighbours together."""
    shares = torch.tensor(MIXES[mix])
    return torch.multinomial(shares, B * -(-T // run), True).view(B, -1).repeat_interleave(run, 1)[:, :T]


def draw_inputs(shape: Shape, device: torch.device, grad: bool = False) -> list[Tensor]:
    """q, k, v of a model: [B, T, H, Dh] in memory; bfloat16 on CUDA, float32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    B, H, T, Dh = shape.B, shape.H, shape.T, shape.Dh
    return [torch.randn(B, T, H, Dh, device=device, dtype=dtype).transpose(1, 2).requires_grad_(grad) for _ in range(3)]


def verify(device: torch.device) -> list[Backend]:
    """The backends of this device, each compared with the reference in values and gradients.

    Raises:
        RuntimeError: one disagrees; no speed-up is reported then.
    """
    backends = [b for b in available_backends(device) if b is not Backend.REFERENCE]
    limit = 2e-2 if device.type == "cuda" else 1e-4
    for backend, run in ((backend, run) for backend in backends for run in (1, 50)):
        inputs = draw_inputs(Shape(2, 4, 777, 64), device, grad=True)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        route = draw_route("25/45/30", 2, 777, run).to(device)
        out = routed_attention(*inputs, route, window=WINDOW, backend=backend)
        want = routed_attention(*exact, route, window=WINDOW, backend="reference")
        weight = torch.randn_like(out)
        got = [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]
        true = [want.detach(), *torch.autograd.grad((want * weight.double()).sum(), exact)]
        for name, g, t in zip(("out", "dq", "dk", "dv"), got, true, strict=True):
            error = float((g.double() - t).norm() / t.norm())
            if not error < limit:
                raise RuntimeError(f"{backend.value} on {device}: {name} is off by {error:.1e}; no speed-up is reported")
    return backends


class Clock:
    """Times calls in turn, medians in milliseconds."""

    def __init__(self, device: torch.device, cpu_time: bool):
        self.device, self.now = device, time.process_time if cpu_time else time.perf_counter

    def __call__(self, calls: dict[str, Call], budget: float = 6.0) -> dict[str, float]:
        """Every call is made once to warm up, then as often as `budget` seconds allow, 1 to 15 times each."""
        total = sum(self._once(call) for call in calls.values()) / 1e3
        repeats = int(min(max(budget / max(total, 1e-6), 1), 15))
        rounds = [{name: self._once(call) for name, call in calls.items()} for _ in range(repeats)]
        return {name: statistics.median(times[name] for times in rounds) for name in calls}

    def _once(self, call: Call) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = self.now()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (self.now() - start) * 1e3


def full_attention(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None, causal: bool = True) -> Tensor:
    """Fused full attention, by one of torch's kernels or its own choice."""
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def baselines(device: torch.device) -> dict[str, SDPBackend | None]:
    """Every full attention worth comparing with."""
    if device.type != "cuda":
        return {"full": None}
    return {"full cudnn": SDPBackend.CUDNN_ATTENTION, "full flash": SDPBackend.FLASH_ATTENTION}


def rows(times: dict[str, float], **facts: Any) -> Iterator[dict[str, Any]]:
    """One row a variant, with its speed-up over the fastest baseline."""
    best = min(ms for name, ms in times.items() if name.startswith("full"))
    for name, ms in times.items():
        ideal = None if name.startswith("full") else facts.get("ideal")
        speedup = best / ms
        yield {**facts, "variant": name, "ms": ms, "speedup": speedup, "ideal": ideal, "share": ideal and speedup / ideal}


def built(shape: Shape) -> list[Expert]:
    """Full, linear and local."""
    return [expert_class(name)(ExpertShape(shape.H, shape.Dh, WINDOW)) for name in EXPERTS]


def ideal_flops(shape: Shape, mix: str) -> float:
    """FLOPs of full attention over those of the mix."""
    costs = [flops(expert, shape.T) for expert in built(shape)]
    return costs[0] / sum(share * cost for share, cost in zip(MIXES[mix], costs, strict=True))


def forward(
    clock: Clock, shape: Shape, mix: str, run: int, backends: list[Backend], training: bool
) -> Iterator[dict[str, Any]]:
    """A causal pass, with its backward pass if `training`."""
    device = clock.device
    inputs, route = draw_inputs(shape, device, training), draw_route(mix, shape.B, shape.T, run).to(device)
    gradient = torch.randn_like(inputs[0])

    def whole(call: Callable[[], Tensor]) -> Call:
        if training:
            return lambda: torch.autograd.grad(call(), inputs, gradient)
        return torch.no_grad()(call)

    calls = {name: whole(partial(full_attention, *inputs, backend)) for name, backend in baselines(device).items()}
    for backend in backends:
        calls[backend.value] = whole(partial(routed_attention, *inputs, route, window=WINDOW, backend=backend))
    facts = {"what": "forward+backward" if training else "forward", "mix": mix, "run": run, **vars(shape)}
    yield from rows(clock(calls), **facts, ideal=ideal_flops(shape, mix))


def decode(clock: Clock, shape: Shape, mix: str) -> Iterator[dict[str, Any]]:
    """One step of a batch in which every row takes its own expert, against full attention over the same keys."""
    device, experts = clock.device, built(shape)
    q, k, v = (x[:, :, :1] for x in draw_inputs(Shape(shape.B, shape.H, 1, shape.Dh), device))
    cache = LayerCache(experts, shape.B, shape.T + 64, shape.H, device=device, dtype=q.dtype)
    assert cache.keys is not None and cache.values is not None
    for store in (cache.keys, cache.values):
        store.normal_()
    cache.lengths.fill_(shape.T - 1)
    cache.longest = shape.T - 1
    shares = torch.tensor(MIXES[mix])
    counts = (shares * shape.B).round().long()
    counts[1] += shape.B - counts.sum()
    route = torch.repeat_interleave(torch.arange(3), counts)[torch.randperm(shape.B)][:, None].to(device)
    keys, values = cache.keys[:, :, : shape.T], cache.values[:, :, : shape.T]

    def step() -> None:
        cache.attend(q, k, v, route)
        cache.lengths -= 1
        cache.longest -= 1

    calls: dict[str, Call] = {
        name: partial(full_attention, q, keys, values, backend, causal=False) for name, backend in baselines(device).items()
    }
    calls["cache"] = step
    own = [read_bytes(e, shape.T, shape.H, q.element_size(), Mode.DECODE) for e in experts]
    states = 2 * sum(state_bytes(e, shape.H) for e in experts)
    taken = counts / shape.B
    floor = float(taken[0] * own[0] + taken[2] * own[2]) + states
    yield from rows(clock(calls), what="decode", mix=mix, run=1, **vars(shape), ideal=own[0] / floor)


def alone(clock: Clock, shape: Shape) -> Iterator[dict[str, Any]]:
    """Linear and local attention of every token, to see them grow with T."""
    inputs = draw_inputs(shape, clock.device)
    names = ("linear", "local")
    calls: dict[str, Call] = {
        name: torch.no_grad()(partial(routed_attention, *inputs, EXPERTS.index(name), window=WINDOW)) for name in names
    }
    times = clock(calls)
    for name in names:
        peak = speed_memory.peak_bytes(name, shape.T, shape.H, shape.Dh, WINDOW, training=False, device=clock.device)
        yield {"what": "alone", "variant": name, **vars(shape), "ms": times[name], "peak_mib": peak / 2**20}


def training_memory(shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """Peak memory of a forward and backward pass, inputs not counted."""
    for variant in ("full", *MIXES):
        shares = MIXES.get(variant)
        peak = speed_memory.peak_bytes(shares or "full", shape.T, shape.H, shape.Dh, WINDOW, training=True, device=device)
        yield {"what": "training memory", "variant": variant, **vars(shape), "peak_mib": peak / 2**20}


def run_benchmark(
    device: torch.device | str | None = None, out: Path | None = None, quick: bool = False, cpu_time: bool = False
) -> pd.DataFrame:
    """Verify, measure, and write speed_<device>.csv and .png to `out` if given. One row a measurement.

    Raises:
        RuntimeError: a backend disagrees with the reference on this device.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    backends = [*verify(where), Backend.AUTO]
    backends.remove(Backend.DENSE)
    found = list(_measure(Clock(where, cpu_time), backends, quick))
    table = pd.DataFrame(found)
    table["device"] = f"{device_name(where)}{', processor time' if cpu_time else ''}"
    table["torch"], table["command"] = torch.__version__, " ".join(["python -m analysis.speed", *sys.argv[1:]])
    if out is not None:
        from analysis.speed_figure import draw  # seaborn takes a second

        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / f"speed_{where.type}.csv", index=False, float_format="%.4g")
        draw(table, out / f"speed_{where.type}.png")
    return table


def _measure(clock: Clock, backends: list[Backend], quick: bool) -> Iterator[dict[str, Any]]:
    cuda = clock.device.type == "cuda"
    heads, most = (16, 65536) if cuda else (8, 32768)
    lengths = (512, 2048) if quick else tuple(2**n for n in range(9, 17) if 2**n <= most)
    backends = [b for b in backends if b is not Backend.TORCH] if cuda else [Backend.AUTO]  # `auto` is `torch` on the CPU
    for T in lengths:
        for mix in MIXES if T <= 8192 or cuda else list(MIXES)[:2]:
            for run in (1, 64) if T <= 8192 or cuda else (1,):
                yield from forward(clock, Shape(1, heads, T, 64), mix, run, backends, training=False)
        if T <= 8192 or cuda:
            yield from forward(clock, Shape(1, heads, T, 64), "10/60/30", 1, backends, training=True)
        yield from decode(clock, Shape(64 if cuda else 10, 8, T, 64), "10/60/30")
    if cuda and not quick:
        yield from forward(clock, Shape(1, 8, 32768, 128), "10/60/30", 1, backends, training=False)
        for mix in list(MIXES)[:2]:
            yield from forward(clock, Shape(2, 16, 8192, 64), mix, 1, backends, training=False)
    for T in (1024, 2048) if quick else (2048, 4096, 8192, 16384, 32768, 65536):
        yield from alone(clock, Shape(1, heads, T, 64))
    yield from training_memory(Shape(1, heads, 1024 if quick else 8192, 64), clock.device)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths only")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, on a machine that is shared")
    options = parser.parse_args()
    table = run_benchmark(options.device, options.out, options.quick, options.cpu_time)
    columns = ("what", "mix", "run", "B", "H", "T", "Dh", "variant", "ms", "speedup", "ideal", "peak_mib")
    shown = table[[c for c in columns if c in table]]
    print(shown.to_string(index=False, float_format="{:.3g}".format, na_rep=""))


if __name__ == "__main__":
    main()
