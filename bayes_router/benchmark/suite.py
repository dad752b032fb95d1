"""The benchmark: verify, measure in turn, write one CSV and one figure.

The rows that have a target come first, then all other combinations of length, mix, clustering and
pass: on a GPU those of the lengths that were compiled for the targets, then the first mix before
the others and single tokens before runs. After SECONDS no further group is begun, and `left_out`
names those: on a GPU with nothing compiled yet, mixes but the first at other lengths.

Never measured: heads that share keys, sinks, padding, gated attention, other windows; the backends
behind `auto` by name and CUDA graphs but for targets and the first mix, token by token; on a CPU
the peak memory of a single pass.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayes_router.attention.hard.auto import AUTO
from bayes_router.attention.hard.backend import Backend
from bayes_router.attention.hard.dispatch import EXPERTS, routed_attention
from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.hard.short import SHORT
from bayes_router.attention.hard.sorted import TRITON
from bayes_router.attention.shapes import ExpertShape, with_units
from bayes_router.benchmark import cases, memory
from bayes_router.benchmark.busy import neighbours
from bayes_router.benchmark.cases import (
    WINDOW,
    Shape,
    baselines,
    draw_inputs,
    draw_route,
    full_attention,
)
from bayes_router.benchmark.clock import Clock, OutOfTime, Thunk, captured
from bayes_router.benchmark.facts import command_line, drawing_packages, versions
from bayes_router.benchmark.pace import SHARE, TRIED, Pace
from bayes_router.benchmark.plan import BESIDE, LENGTHS, BenchmarkPlan, Group, plan_groups
from bayes_router.benchmark.ratios import GRAPH, compared, doubling
from bayes_router.benchmark.verify import verify
from bayes_router.checks import require
from bayes_router.progress import Progress
from bayes_router.timing import device_name

if TYPE_CHECKING:
    import pandas as pd

BIG_MEMORY = 40 * 2**30  # bytes of a GPU that is given the longest text
CPU_BUDGET, CUDA_BUDGET, QUICK_BUDGET = 6.0, 1.0, 0.2  # seconds of a group, at most
SECONDS = {"cpu": 1800.0, "cuda": 240.0}
"""Of all, after which no group is begun. Holding every backend against the reference is included:
on an H100 up to 95 s the first time, when every kernel is compiled, and 15 s after."""
DRAWING = 2.0  # seconds at the end, at the least


def run_benchmark(
    device: torch.device,
    plan: BenchmarkPlan,
    out: Path | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    started: float | None = None,
    progress: Progress | None = None,
) -> "pd.DataFrame":
    """Verify, measure, and write speed_<device>.csv and .png to `out` if given.

    One row a measurement.

    What was left out for want of time stands in `attrs["left_out"]`. Rows measured so far stand in
    speed_<device>.partial.csv until all are there; `on_row` is called with each. `started` is when
    the time of `plan.seconds` began, by `time.perf_counter`; now by default.

    Raises:
        ValueError: a backend disagrees with the reference on this device, or a package is missing.
    """
    importing = time.perf_counter()
    started = importing if started is None else started
    drawing_packages()
    from bayes_router.benchmark.figure import draw
    from bayes_router.benchmark.rows import Rows

    # what takes long to import takes as long to draw, on a machine that has much to do
    drawing = max(DRAWING, time.perf_counter() - importing)
    progress = progress or Progress("bench", shown=False)
    progress.say("holding every backend against the reference")
    if plan.cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    limit = plan.seconds or SECONDS[device.type]
    suite = Suite(device, plan, verify(device, until=started + limit), started, drawing)
    facts = {
        "device": f"{device_name(device)}{', processor time' if plan.cpu_time else ''}",
        "versions": versions(device),
    }
    facts["command"] = command_line()
    path = None if out is None else out / f"speed_{device.type}.csv"
    rows = Rows(path, facts)
    for row in suite.rows(progress):
        rows.add(row)
        on_row(row)
    table = rows.finish()
    require(
        len(table) > 0,
        "seconds",
        "time to measure something",
        limit,
        "give more; nothing was written",
    )
    table.attrs["left_out"] = _named(suite.left_out)
    table.attrs["missed"] = [
        (g.what, g.mix, g.run, g.shape.B, g.shape.H, g.shape.Dh, g.shape.T) for g in suite.left_out
    ]
    if path is not None:
        draw(table, path.with_suffix(".png"))
    return table


def _named(groups: Sequence[Group]) -> list[str]:
    lengths: dict[str, list[str]] = {}
    for group in groups:
        lengths.setdefault(group.kind, []).append(str(group.shape.T))
    return [f"{kind}: T {', '.join(found)}" for kind, found in lengths.items()]


class Suite:
    """All measurements of a device, as rows of a table.

    `left_out` is what there was no time for.
    """

    def __init__(
        self,
        device: torch.device,
        plan: BenchmarkPlan,
        backends: Sequence[Backend],
        started: float | None = None,
        drawing: float = DRAWING,
    ):
        self.device, self.plan, self.cuda = device, plan, device.type == "cuda"
        self.budget = QUICK_BUDGET if plan.quick else CUDA_BUDGET if self.cuda else CPU_BUDGET
        self.clock = Clock(device, self.budget, plan.cpu_time)
        self.groups = plan_groups(plan, self.cuda, self._longest())
        self.own = [b for b in backends if b in (TRITON, SHORT)]
        started = time.perf_counter() if started is None else started
        self.end = started + (plan.seconds or SECONDS["cuda" if self.cuda else "cpu"]) - drawing
        # without a wish the last group may end later
        self.clock.end = self.end if plan.seconds else math.inf
        self.pace = Pace(device, SHARE if plan.seconds else 1.0)
        self.left_out: list[Group] = []
        self.before: dict[str, dict[str, Any]] = {}  # the last row of each expert alone

    def _longest(self) -> int:
        """Tokens of the longest usual text."""
        large = (
            self.cuda and torch.cuda.get_device_properties(self.device).total_memory >= BIG_MEMORY
        )
        return LENGTHS[-1] if large else LENGTHS[-2]

    def rows(self, progress: Progress | None = None) -> Iterator[dict[str, Any]]:
        """Every measurement that there is time for."""
        progress = progress or Progress("bench", shown=False)
        progress.total = len(self.groups)
        measures = {
            "decode": self.decode,
            "alone": self.alone,
            "training memory": self.training_memory,
            BESIDE: self.beside,
        }
        for number, group in enumerate(self.groups):
            progress.step()
            measure = measures.get(group.what, self.causal)
            left = self.end - time.perf_counter()
            if self.plan.seconds and left > 0 and self.pace.unknown(group.what, group.shape):
                self._try(group, measure)
                left = self.end - time.perf_counter()
            if not self.pace.fits(group.what, group.shape, left, self._variants()):
                self.left_out.append(group)
                continue
            progress.say(f"{group.kind} T{group.shape.T}")
            # half of it for drawing, compiling and warming up
            share = left / (len(self.groups) - number)
            self.clock.budget = self.budget if group.target else min(self.budget, share / 2)
            try:
                yield from measure(group)
            except OutOfTime:
                self.left_out.append(group)
                continue
            if group.what != "training memory":
                self.pace.learn(group.what, group.shape, self.clock.once)

    def _try(self, group: Group, measure: Callable[[Group], Iterator[dict[str, Any]]]) -> None:
        """Learn from a short text how long such a group will take; of what is read, no row."""
        short, self.clock.budget = replace(group.shape, T=TRIED), 0.0
        try:
            next(iter(measure(replace(group, shape=short))))
            once = self.clock.once
        except OutOfTime:
            once = math.inf  # none of its kind will end in time
        self.pace.learn(group.what, short, once)

    def _variants(self) -> int:
        """Readings of a peak of training memory: full attention, and every mix."""
        return 1 + len({group.mix for group in self.groups if group.mix})

    def _leads(self, group: Group) -> bool:
        """Whether this group is measured with every backend and as CUDA graphs."""
        first = next((group.mix for group in self.groups if group.mix), "")
        return group.target or (group.run == 1 and group.mix == first)

    def causal(self, group: Group) -> Iterator[dict[str, Any]]:
        """A causal pass, planning included, with its backward pass if the group has it."""
        shape, training, leads = group.shape, group.what != "forward", self._leads(group)
        inputs = draw_inputs(shape, self.device, training)
        route = draw_route(group.mix, shape.B, shape.T, group.run).to(self.device)
        gradient = torch.randn_like(inputs[0])

        def whole(call: Callable[[], Tensor]) -> Thunk:
            if training:
                return lambda: torch.autograd.grad(call(), inputs, gradient)
            return torch.no_grad()(call)

        calls = {
            name: whole(partial(full_attention, *inputs, backend))
            for name, backend in baselines(self.device).items()
        }
        q, k, v = inputs
        experts = resolve_experts(EXPERTS, ExpertShape(shape.H, shape.Dh, WINDOW))
        problem = RoutedProblem(q, k, v, q, k, with_units(route), experts)
        for backend in (*(self.own if leads else ()), AUTO):
            if backend.refuses(problem):
                continue
            calls[backend.name] = whole(
                partial(routed_attention, *inputs, route, window=WINDOW, backend=backend)
            )
        peaks = (
            {name: memory.peak_of(call, self.device) / 2**20 for name, call in calls.items()}
            if self.cuda
            else {}
        )
        if self.own and leads:
            calls.update(
                {
                    GRAPH + name: captured(calls[name])
                    for name in calls
                    if name.startswith("full") or name == "auto"
                }
            )
        facts = {"what": group.what, "mix": group.mix, "run": group.run, **vars(shape)}
        yield from compared(
            self.clock(calls), peaks, **facts, ideal=cases.ideal_flops(shape, group.mix)
        )

    def beside(self, group: Group) -> Iterator[dict[str, Any]]:
        """`causal`, forward, while another process computes all the time."""
        with neighbours(1):
            for row in self.causal(replace(group, what="forward")):
                yield row | {"what": group.what}

    def decode(self, group: Group) -> Iterator[dict[str, Any]]:
        """One decoding step of a batch."""
        calls, ideal = cases.decode_calls(group.shape, group.mix, self.device, group.run)
        calls = {name: torch.no_grad()(call) for name, call in calls.items()}
        if self.own and self._leads(group):
            calls.update({GRAPH + name: captured(calls[name]) for name in tuple(calls)})
        yield from compared(
            self.clock(calls),
            {},
            what="decode",
            mix=group.mix,
            run=group.run,
            **vars(group.shape),
            ideal=ideal,
        )

    def alone(self, group: Group) -> Iterator[dict[str, Any]]:
        """Linear and local attention of every token, to see them grow with T."""
        shape, inputs = group.shape, draw_inputs(group.shape, self.device)
        calls: dict[str, Thunk] = {
            name: torch.no_grad()(
                partial(routed_attention, *inputs, EXPERTS.index(name), window=WINDOW)
            )
            for name in ("linear", "local")
        }
        for name, (ms, wall_ms) in self.clock(calls).items():
            row = {"what": "alone", "variant": name, **vars(shape), "ms": ms, "wall_ms": wall_ms}
            if memory.measurable(self.device) and (self.cuda or not self.plan.quick):
                try:
                    row["peak_mib"] = self._peak(name, shape, training=False)
                except OutOfTime:  # the times are there
                    self.left_out.append(replace(group, what=f"memory of {name} alone"))
            yield row | doubling(self.before.get(name), row)
            self.before[name] = row

    def training_memory(self, group: Group) -> Iterator[dict[str, Any]]:
        """Peak memory of a forward and backward pass, inputs not counted."""
        if not memory.measurable(self.device):
            return
        full = self._peak("full", group.shape, training=True)
        mixes = dict.fromkeys(group.mix for group in self.groups if group.mix)
        for variant in ("full", *mixes):
            peak = (
                full
                if variant == "full"
                else self._peak(cases.mix_shares(variant), group.shape, training=True)
            )
            yield {
                "what": group.what,
                "variant": variant,
                **vars(group.shape),
                "peak_mib": peak,
                "over_full": peak / full,
            }

    def _peak(self, kind: str | Sequence[float], shape: Shape, training: bool) -> float:
        """MiB; OutOfTime where the process that reads them would not end in time, or did not."""
        if not self.cuda:
            self.clock.check(self.pace.process)
        began = time.perf_counter()
        try:
            found = memory.peak_bytes(
                kind,
                shape.T,
                shape.H,
                shape.Dh,
                WINDOW,
                training=training,
                device=self.device,
                patience=None if math.isinf(self.clock.end) else self.clock.end - began,
            )
        except TimeoutError:
            raise OutOfTime from None
        self.pace.process = max(self.pace.process, time.perf_counter() - began)
        return found / 2**20
