"""The benchmark: verify, measure in turn, tell where routing loses, write one CSV and one figure."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayes_router.attention.dispatch import EXPERTS, Backend, routed_attention
from bayes_router.attention.latency import device_name
from bayes_router.benchmark import cases, memory
from bayes_router.benchmark.cases import MIXES, WINDOW, Shape, baselines, draw_inputs, draw_route, full_attention
from bayes_router.benchmark.clock import Call, Clock, Timing, captured
from bayes_router.benchmark.verify import verify

if TYPE_CHECKING:
    import pandas as pd

LENGTHS = tuple(2**n for n in range(9, 17))
BIG_MEMORY = 40 * 2**30  # bytes of a GPU that is given the longest text
GRAPH = "graph "  # before the name of a variant that is replayed from a CUDA graph
CPU_BUDGET, CUDA_BUDGET, QUICK_BUDGET = 6.0, 1.0, 0.2  # seconds a group


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        quick: short texts, one mix, no memory of single experts.
        lengths: tokens; None for what suits the device.
        mixes: percentages full/linear/local; None for three, or one if quick.
        cpu_time: on a CPU, processor time of one thread instead of the clock on the wall.
    """

    quick: bool = False
    lengths: tuple[int, ...] | None = None
    mixes: tuple[str, ...] | None = None
    cpu_time: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for length in self.lengths or ():
            if length < 1:
                raise ValueError(f"lengths: expected at least 1 token; got {length}")
        for mix in self.mixes or ():
            cases.mix_shares(mix)


def run_benchmark(
    device: torch.device, plan: Plan, out: Path | None = None, on_row: Callable[[dict[str, Any]], None] = lambda row: None
) -> "pd.DataFrame":
    """Verify, measure, and write speed_<device>.csv and .png to `out` if given. One row a measurement.

    Rows measured so far stand in speed_<device>.partial.csv until all are there; `on_row` is called with each.

    Raises:
        ValueError: a backend disagrees with the reference on this device, or a package is missing.
    """
    pandas = drawing_packages()
    if plan.cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    backends = verify(device)
    facts = {"device": f"{device_name(device)}{', processor time' if plan.cpu_time else ''}", "versions": versions(device)}
    facts["command"] = command_line()
    rows: list[dict[str, Any]] = []
    path = None if out is None else out / f"speed_{device.type}.csv"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for row in Suite(device, plan, backends).rows():
        rows.append({**row, **facts})
        on_row(row)
        if path is not None:
            pandas.DataFrame(rows).to_csv(path.with_suffix(".partial.csv"), index=False, float_format="%.4g")
    table: pd.DataFrame = pandas.DataFrame(rows)
    if path is not None:
        from bayes_router.benchmark.figure import draw

        path.with_suffix(".partial.csv").replace(path)
        draw(table, path.with_suffix(".png"))
    return table


def drawing_packages() -> Any:
    """The module pandas; a ValueError with the fix where it or seaborn is missing."""
    try:
        import pandas
        import seaborn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"bench: expected the packages pandas and seaborn; got: {error}; run: pip install seaborn") from None
    return pandas


def command_line() -> str:
    """What was typed, shorter: programs by their names."""
    name = Path(sys.argv[0]).name
    known = {"speed.py": "python -m analysis.speed", "speed_model.py": "python -m analysis.speed_model"}
    return " ".join([known.get(name, "bayes-router"), *sys.argv[1:]])


def versions(device: torch.device) -> str:
    """Of Python, torch and what its kernels are made with."""
    parts = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
        try:
            import triton

            parts.append(f"triton {triton.__version__}")
        except ImportError:
            parts.append("no triton")
    return ", ".join(parts)


class Suite:
    """All measurements of a device, as rows of a table."""

    def __init__(self, device: torch.device, plan: Plan, backends: Sequence[Backend]):
        self.device, self.plan, self.cuda = device, plan, device.type == "cuda"
        budget = QUICK_BUDGET if plan.quick else CUDA_BUDGET if self.cuda else CPU_BUDGET
        self.clock = Clock(device, budget, plan.cpu_time)
        self.heads = 16 if self.cuda else 8
        self.mixes = plan.mixes or (MIXES[:1] if plan.quick else MIXES)
        own = [b for b in backends if b in (Backend.TRITON, Backend.SHORT)]
        self.backends = [*own, Backend.AUTO]  # on a CPU `auto` is `torch`

    def lengths(self) -> tuple[int, ...]:
        """The lengths asked for, or those that suit the device."""
        if self.plan.lengths:
            return self.plan.lengths
        if self.plan.quick:
            return (512, 2048)
        large = self.cuda and torch.cuda.get_device_properties(self.device).total_memory >= BIG_MEMORY
        return LENGTHS if large else LENGTHS[:-1]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every measurement."""
        lengths, quick = self.lengths(), self.plan.quick
        if self.cuda and not quick and not self.plan.lengths:
            yield from self.forward(Shape(1, 8, 32768, 128), self.mixes[0], 1)
            for mix in self.mixes[:2]:
                yield from self.forward(Shape(2, 16, 8192, 64), mix, 1)
        for T in reversed(lengths):
            short = T <= 8192 or self.cuda  # a CPU takes half a minute for one longer pass
            shape = Shape(1, self.heads, T, 64)
            for mix in self.mixes if short else self.mixes[:2]:
                for run in (1, 64) if short else (1,):
                    yield from self.forward(shape, mix, run)
            if short:
                yield from self.forward(shape, self.mixes[0], 1, training=True)
            yield from self.decode(Shape(64 if self.cuda else 10, 8, T, 64), self.mixes[0])
        for T in lengths if self.plan.lengths or quick else (2048, 4096, 8192, 16384, 32768, 65536):
            yield from self.alone(Shape(1, self.heads, T, 64))
        most = max(lengths) if self.plan.lengths else 1024 if quick else 8192
        yield from self.training_memory(Shape(1, self.heads, most if self.cuda else min(most, 8192), 64))

    def forward(self, shape: Shape, mix: str, run: int, training: bool = False) -> Iterator[dict[str, Any]]:
        """A causal pass, planning included, with its backward pass if `training`."""
        inputs, route = draw_inputs(shape, self.device, training), draw_route(mix, shape.B, shape.T, run).to(self.device)
        gradient = torch.randn_like(inputs[0])

        def whole(call: Callable[[], Tensor]) -> Call:
            if training:
                return lambda: torch.autograd.grad(call(), inputs, gradient)
            return torch.no_grad()(call)

        calls = {name: whole(partial(full_attention, *inputs, backend)) for name, backend in baselines(self.device).items()}
        for backend in self.backends:
            if backend is Backend.SHORT and (training or shape.T > 16384):  # quadratic, and it has no backward pass
                continue
            calls[backend.value] = whole(partial(routed_attention, *inputs, route, window=WINDOW, backend=backend))
        peaks = {name: memory.peak_of(call, self.device) / 2**20 for name, call in calls.items()} if self.cuda else {}
        if Backend.TRITON in self.backends and not training:
            calls.update({GRAPH + name: captured(calls[name]) for name in calls if name.startswith("full") or name == "auto"})
        facts = {"what": "forward+backward" if training else "forward", "mix": mix, "run": run, **vars(shape)}
        yield from compared(self.clock(calls), peaks, **facts, ideal=cases.ideal_flops(shape, mix))

    def decode(self, shape: Shape, mix: str) -> Iterator[dict[str, Any]]:
        """One decoding step of a batch."""
        calls, ideal = cases.decode_calls(shape, mix, self.device)
        calls = {name: torch.no_grad()(call) for name, call in calls.items()}
        if Backend.TRITON in self.backends:
            calls.update({GRAPH + name: captured(calls[name]) for name in tuple(calls)})
        yield from compared(self.clock(calls), {}, what="decode", mix=mix, run=1, **vars(shape), ideal=ideal)

    def alone(self, shape: Shape) -> Iterator[dict[str, Any]]:
        """Linear and local attention of every token, to see them grow with T."""
        inputs = draw_inputs(shape, self.device)
        calls: dict[str, Call] = {
            name: torch.no_grad()(partial(routed_attention, *inputs, EXPERTS.index(name), window=WINDOW))
            for name in ("linear", "local")
        }
        for name, (ms, wall_ms) in self.clock(calls).items():
            row = {"what": "alone", "variant": name, **vars(shape), "ms": ms, "wall_ms": wall_ms}
            if memory.measurable(self.device) and (self.cuda or not self.plan.quick):
                row["peak_mib"] = self._peak(name, shape, training=False)
            yield row

    def training_memory(self, shape: Shape) -> Iterator[dict[str, Any]]:
        """Peak memory of a forward and backward pass, inputs not counted."""
        if not memory.measurable(self.device):
            return
        for variant in ("full", *self.mixes):
            kind = "full" if variant == "full" else cases.mix_shares(variant)
            row = {"what": "training memory", "variant": variant, **vars(shape)}
            yield {**row, "peak_mib": self._peak(kind, shape, training=True)}

    def _peak(self, kind: str | Sequence[float], shape: Shape, training: bool) -> float:
        found = memory.peak_bytes(kind, shape.T, shape.H, shape.Dh, WINDOW, training=training, device=self.device)
        return found / 2**20


def compared(times: dict[str, Timing], peaks: dict[str, float], **facts: Any) -> Iterator[dict[str, Any]]:
    """One row a variant, with its speed-up over the fastest full attention, graphs over graphs."""
    for name, (ms, wall_ms) in times.items():
        prefix = GRAPH if name.startswith(GRAPH) else ""
        rivals = [timing for other, timing in times.items() if other.startswith(f"{prefix}full")]
        speedup = min(rival.ms for rival in rivals) / ms
        row = {**facts, "variant": name, "ms": ms, "wall_ms": wall_ms, "speedup": speedup}
        row["wall_speedup"] = min(rival.wall_ms for rival in rivals) / wall_ms
        routed = not name.startswith(f"{prefix}full")
        row |= {"ideal": facts["ideal"] if routed else None, "share": speedup / facts["ideal"] if routed else None}
        yield {**row, "peak_mib": peaks.get(name)}


def break_even(table: "pd.DataFrame") -> list[str]:
    """Where routing loses, a line for each pass and mix: the shortest text from which it stays ahead of full attention."""
    lines = []
    routed = table[table["variant"].isin(["auto", "cache"]) & (table["run"] == 1)]
    for (what, mix), group in routed.groupby(["what", "mix"], sort=False):
        first = group.drop_duplicates("T").sort_values("T")
        lost = first[first["speedup"] < 1]
        if lost.empty:
            lines.append(f"{what} {mix}: ahead of full attention at every length measured")
            continue
        worst, last = lost.loc[lost["speedup"].idxmin()], int(lost["T"].max())
        won = first[first["T"] > last]["T"]
        where = f"ahead from {int(won.min())} tokens" if len(won) else "ahead nowhere"
        lines.append(f"{what} {mix}: {where}; loses up to {last} ({worst['speedup']:.2f}x at {int(worst['T'])})")
    return lines
