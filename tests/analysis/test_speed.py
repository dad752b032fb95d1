"""The benchmark behind `python -m analysis.speed.kernels`.

What it refuses, how it compares, where it says that
routing loses."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.hard.auto import AUTO
from bayes_router.attention.hard.backend import Backend
from bayes_router.attention.hard.dense import DENSE
from bayes_router.attention.hard.dispatch import EXPERTS
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.hard.rows import TORCH
from bayes_router.benchmark import cases, clock, facts, memory, pace, suite, summary, verify
from bayes_router.benchmark.cases import Shape
from bayes_router.benchmark.clock import Clock
from bayes_router.benchmark.figure import draw
from bayes_router.benchmark.plan import BESIDE, LENGTHS, BenchmarkPlan, Group, plan_groups
from bayes_router.benchmark.ratios import compared, doubling
from bayes_router.benchmark.suite import Suite, run_benchmark
from bayes_router.config import ModelConfig
from bayes_router.timing import Timing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other take minutes on a machine that is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_nothing_is_reported_while_a_backend_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = verify.routed_attention

    def wrong(*inputs: object, backend: Backend | str, **options: object) -> torch.Tensor:
        out = right(*inputs, backend=backend, **options)  # type: ignore[arg-type]
        return out * 1.01 if backend is TORCH else out

    monkeypatch.setattr(verify, "routed_attention", wrong)
    with pytest.raises(
        ValueError, match="torch on cpu: out is off by 1.0e-02; no speed-up is reported"
    ):
        run_benchmark(CPU, BenchmarkPlan(quick=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_backend_is_verified_where_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split rows, both head sizes, shared key heads, padding, one expert.

    And a cache of as many keys.
    """
    seen, right = set(), verify.routed_attention

    def watched(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        route: torch.Tensor | int,
        **options: object,
    ) -> torch.Tensor:
        kinds = 1 if isinstance(route, int) else len(route.unique())
        facts = (
            q.shape[2] > 4000,
            q.shape[3],
            q.shape[1] > k.shape[1],
            options.get("lengths") is not None,
            kinds == 1,
        )
        seen.add((options["backend"], q.requires_grad and torch.is_grad_enabled(), *facts))
        return right(q, k, v, route, **options)  # type: ignore[arg-type]

    held = []
    cache = verify.LayerCache
    monkeypatch.setattr(verify, "routed_attention", watched)
    monkeypatch.setattr(
        verify, "LayerCache", lambda *a, **o: held.append(cache(*a, **o)) or held[-1]
    )
    assert set(verify.verify(CPU)) == {TORCH, DENSE}
    for backend in (TORCH, DENSE):
        assert {
            (backend, False, True, 64, True, False, False),
            (backend, False, True, 128, True, False, False),
        } <= seen
        assert {
            (backend, False, False, 64, True, True, False),
            (backend, False, True, 64, True, False, True),
        } <= seen
        assert (backend, True, False, 64, True, False, False) in seen and (
            backend,
            True,
            False,
            64,
            False,
            False,
            False,
        ) in seen
    assert (TORCH, True, True, 64, True, False, False) in seen and (
        AUTO,
        False,
        True,
        64,
        True,
        False,
        True,
    ) in seen
    assert held[0].slots >= 4000 and held[0].lengths.tolist() == [held[0].slots] * 3


def test_what_is_wrong_only_in_long_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.routed_attention

    def wrong(
        q: torch.Tensor, *inputs: object, backend: Backend | str, **options: object
    ) -> torch.Tensor:
        out = right(q, *inputs, backend=backend, **options)  # type: ignore[arg-type]
        late = torch.arange(out.shape[2]) > 4000
        return out * (1 + 0.1 * late[:, None]) if backend is TORCH else out

    monkeypatch.setattr(verify, "CASES", verify.CASES[3:])
    monkeypatch.setattr(verify, "routed_attention", wrong)
    with pytest.raises(ValueError, match="torch on cpu: out is off by .*; no speed-up is reported"):
        verify.verify(CPU)


def test_a_cache_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.LayerCache.attend

    def wrong(self: verify.LayerCache, q: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return right(self, q, *inputs) * (1.01 if q.shape[2] == 1 else 1.0)

    monkeypatch.setattr(verify.LayerCache, "attend", wrong)
    with pytest.raises(
        ValueError, match="the cache on cpu: out is off by 1.0e-02; no speed-up is reported"
    ):
        case = verify.Case(Shape(3, 2, 700, 32), 1, grad=False)
        verify._verify_cache(case, verify._built(EXPERTS, case.shape, CPU), CPU)


@pytest.mark.parametrize("experts", [("full", "gated", "local"), ("gated",)])
def test_other_experts_are_verified_too(
    experts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CASES", (verify.Case(Shape(2, 2, 300, 32), 1),))
    monkeypatch.setattr(verify, "LONG", 700)
    assert set(verify.verify(CPU, experts)) == {TORCH, DENSE}


class _Asking:
    """A backend that refuses everything, once it has read how many units were routed."""

    name = "asking"

    def __init__(self) -> None:
        self.units: list[int] = []

    def refuses(self, problem: RoutedProblem) -> str | None:
        self.units.append(problem.units)
        return "it only asks"


def test_backends_are_asked_about_a_whole_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = _Asking()
    monkeypatch.setattr(verify, "CASES", (verify.Case(Shape(1, 2, 64, 32), 1),))
    monkeypatch.setattr(verify, "LONG", 700)
    monkeypatch.setattr(verify, "backends", lambda: (asking,))
    assert not verify.verify(CPU) and set(asking.units) == {1}
    asked = len(asking.units)
    monkeypatch.setattr(suite, "AUTO", asking)
    timed = Suite(CPU, BenchmarkPlan(lengths=(64,), mixes=("10/60/30",), seconds=60.0), [])
    next(iter(timed.causal(replace(timed.groups[0], what="forward", mix="10/60/30", run=1))))
    assert asking.units[asked:] == [1]


def test_a_model_is_verified_at_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[verify.Case, list[Expert]]] = []
    monkeypatch.setattr(verify, "LONG", 700)
    monkeypatch.setattr(verify, "verify", lambda device, experts: [TORCH])
    right = verify._verify
    monkeypatch.setattr(
        verify,
        "_verify",
        lambda case, experts, *rest: seen.append((case, experts)) or right(case, experts, *rest),
    )
    config = ModelConfig(
        d_model=32, num_heads=4, num_kv_heads=2, experts=("gated", "local"), window=9
    )
    verify.verify_model(CPU, config)
    (case, experts), *none = seen
    assert not none and case.shape == Shape(1, 4, 700, 8) and case.kv_heads == 2
    assert [(expert.name, *expert.shape[:3]) for expert in experts] == [
        ("gated", 4, 8, 9),
        ("local", 4, 8, 9),
    ]


def test_calls_take_turns_and_medians_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = Clock(CPU, budget=100.0)({name: lambda name=name: order.append(name) for name in "ab"})  # type: ignore[misc]
    assert order == ["a", "b"] * (1 + clock.MOST)
    assert all(timing.ms == timing.wall_ms > 0 for timing in times.values())


def test_graphs_are_compared_with_graphs() -> None:
    names = ("full cudnn", "full flash", "auto", "graph full cudnn", "graph auto")
    times = dict(
        zip(
            names,
            (Timing(2, 8), Timing(4, 4), Timing(1, 8), Timing(2, 6), Timing(4, 3)),
            strict=True,
        )
    )
    rows = {row["variant"]: row for row in compared(times, {"auto": 7.0}, ideal=4.0)}
    assert (rows["auto"]["speedup"], rows["auto"]["wall_speedup"], rows["auto"]["share"]) == (
        2.0,
        0.5,
        0.5,
    )
    assert (rows["graph auto"]["speedup"], rows["graph auto"]["wall_speedup"]) == (0.5, 2.0)
    assert rows["full flash"]["share"] is None and rows["auto"]["peak_mib"] == 7.0


FACTS = {"what": "forward", "variant": "auto", "run": 1, "B": 1, "H": 16, "Dh": 64, "mix": "a"}


def table(*points: tuple[int, float, float], **changes: object) -> pd.DataFrame:
    return pd.DataFrame(
        [{**FACTS, "T": T, "speedup": s, "wall_speedup": w, **changes} for T, s, w in points]
    )


def test_the_losing_region_is_said_for_each_shape_and_clock() -> None:
    rows = pd.concat(
        [
            table((512, 0.5, 0.5), (1024, 1.1, 1.1), (2048, 0.97, 0.97), (4096, 2.0, 2.0)),
            table((4096, 0.6, 0.6), Dh=128),  # not mixed with the same length of another head size
            table((4096, 0.2, 0.2), run=64),
            table((512, 1.2, 0.3), (1024, 1.3, 1.4), mix="b"),
            table((512, 0.1, 0.1), variant="full"),
            table((512, 1.2, 1.2), what="decode", variant="cache", B=64, H=8),
        ]
    )
    assert summary.break_even(rows) == [
        "forward a, runs of 1, B1 H16 Dh64: ahead from 4096 tokens, loses up to 2048 (0.50x at "
        "512), "
        "slower than 1.05x full at 512",
        "forward a, runs of 1, B1 H16 Dh128: ahead nowhere, loses up to 4096 (0.60x at 4096), "
        "slower than 1.05x full at 4096",
        "forward a, runs of 64, B1 H16 Dh64: ahead nowhere, loses up to 4096 (0.20x at 4096), "
        "slower than 1.05x full at 4096",
        "forward b, runs of 1, B1 H16 Dh64: busy stream: ahead at all 2 lengths measured (512, "
        "1024); isolated calls: ahead "
        "from 1024 tokens, loses up to 512 (0.30x at 512), slower than 1.05x full at 512",
        "decode a, runs of 1, B64 H8 Dh64: ahead at the one length measured (512)",
    ]
    where = (
        "full attention's time (forward a, runs of 64, B1 H16 T4096 Dh64); at most 1.05x is the aim"
    )
    assert summary.worst(rows) == [f"worst auto, busy stream, isolated calls: 5.00x {where}"]
    other = pd.concat([rows, table((512, 1.0, 0.1), run=64)])
    assert summary.worst(other)[0] == f"worst auto, busy stream: 5.00x {where}"
    assert summary.worst(other)[1].startswith(
        "worst auto, isolated calls: 10.00x full attention's time (forward a, runs of 64, "
    )


def test_memory_and_growth_are_said() -> None:
    size = {"B": 1, "H": 16, "Dh": 64}
    alone: list[dict[str, object]] = []
    for T, ms, mib in ((2048, 1.0, 10.0), (4096, 2.2, 20.0), (16384, 8.8, 80.0)):
        row = {"what": "alone", "variant": "linear", "T": T, "ms": ms, "peak_mib": mib, **size}
        alone.append(row | doubling(alone[-1] if alone else None, row))
    assert "time_growth" not in alone[0] and alone[1]["time_growth"] == pytest.approx(2.2)
    assert alone[2]["time_growth"] == pytest.approx(2.0) and alone[2][
        "memory_growth"
    ] == pytest.approx(2.0)
    assert not doubling({**alone[0], "H": 8}, alone[1])
    trained = {
        "what": "training memory",
        "variant": "10/60/30",
        "T": 8192,
        "peak_mib": 126.0,
        "over_full": 1.26,
        **size,
    }
    whole = pd.DataFrame([*alone, trained, {**trained, "variant": "full", "over_full": 1.0}])
    whole.attrs["left_out"] = ["decode b", "decode c"]
    assert summary.closing(whole) == [
        "training memory 10/60/30, B1 H16 T8192 Dh64: 1.26x full attention's (126 MiB)",
        "linear alone, H16 Dh64, a doubling from T 2048 to 16384: time 2.10x (at most 2.20x), "
        "memory 2.00x (at most 2.00x)",
        "left out for want of time: decode b",
        "left out for want of time: decode c",
    ]


def test_targets_come_first_and_nothing_is_measured_twice() -> None:
    groups = plan_groups(BenchmarkPlan(), cuda=True)
    first = [f"{group.kind} {group.shape}" for group in groups if group.target]
    assert first[:8] == [
        "forward 10/60/30, runs of 1 B1 H16 T32768 Dh64",
        "forward 25/45/30, runs of 1 B1 H16 T32768 Dh64",
        "forward 10/60/30, runs of 1 B1 H8 T32768 Dh128",
        "forward 10/60/30, runs of 1 B2 H16 T8192 Dh64",
        "forward 25/45/30, runs of 1 B2 H16 T8192 Dh64",
        "forward+backward 10/60/30, runs of 1 B1 H16 T32768 Dh64",
        "decode 10/60/30, runs of 1 B64 H8 T32768 Dh64",
        "training memory B1 H16 T8192 Dh64",
    ]
    assert (
        all(group.target for group in groups[: len(first)])
        and first[-1] == "alone B1 H16 T65536 Dh64"
    )
    # lengths x runs x mixes and passes, less those measured already
    ready = groups[len(first) :][: 2 * 2 * 9 - 4]
    assert {group.shape.T for group in ready} == {8192, 32768} and {
        group.mix for group in ready
    } == {*cases.MIXES}
    assert groups[len(first) + len(ready)].shape.T == 512 and {group.run for group in ready} == {
        1,
        64,
    }
    assert len(set(groups)) == len(groups)
    for cuda, most in ((True, 65536), (False, 32768)):
        combined = {
            (g.what, g.mix, g.run, g.shape.T) for g in plan_groups(BenchmarkPlan(), cuda, most)
        }
        for what in ("forward", "forward+backward", "decode"):
            for mix in cases.MIXES:
                assert {
                    (what, mix, run, T) for run in (1, 64) for T in LENGTHS if most >= T
                } <= combined


@pytest.mark.parametrize("cards", [1, 2, 4])
def test_parts_are_all_of_the_plan_and_divide_no_length(cards: int) -> None:
    whole = plan_groups(BenchmarkPlan(), cuda=True)
    parts = [
        plan_groups(BenchmarkPlan(part=f"{place}/{cards}"), cuda=True)
        for place in range(1, cards + 1)
    ]
    assert all(parts) and sorted(map(str, whole)) == sorted(map(str, (g for p in parts for g in p)))
    lengths = [{g.shape.T for g in part if g.what != "alone"} for part in parts]
    assert sum(map(len, lengths)) == len(set().union(*lengths)) == len(LENGTHS)
    # the growth of experts alone is read from one length to the next, on one card
    assert sum(any(g.what == "alone" for g in part) for part in parts) == 1


def test_a_part_that_begins_with_experts_alone_reads_the_first_mix_every_way() -> None:
    suite = Suite(CPU, BenchmarkPlan(), [])
    suite.groups = plan_groups(BenchmarkPlan(part="3/4"), cuda=True)
    assert suite.groups[0].what == "alone"
    led = {g.mix for g in suite.groups if suite._leads(g) and not g.target}
    assert led == {cases.MIXES[0]}


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "1/0", "a/b", "1/2/3", ""])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match="part: expected K/N with K of 1 to N, as 2/4; got"):
        BenchmarkPlan(part=part)
    with pytest.raises(ValueError, match="part: expected at most 2 parts, which there are lengths"):
        plan_groups(BenchmarkPlan(lengths=(64,), part="3/3"), cuda=False)


def test_one_shape_is_measured_alone() -> None:
    groups = plan_groups(BenchmarkPlan(shapes=("2x4x300x32",), mixes=("10/60/30",)), cuda=False)
    assert {group.shape for group in groups if group.mix} == {Shape(2, 4, 300, 32)}
    assert {group.what for group in groups} == {
        "forward",
        "forward+backward",
        "decode",
        "alone",
        "training memory",
    }
    # one sequence
    assert {group.shape for group in groups if not group.mix} == {Shape(1, 4, 300, 32)}
    both = plan_groups(BenchmarkPlan(shapes=("2x4x300x32",), lengths=(64,)), cuda=False)
    assert {group.shape.T for group in both} == {300, 64}
    longest = [
        g.shape.T
        for g in plan_groups(BenchmarkPlan(lengths=(32768, 512)), cuda=False)
        if g.what == "training memory"
    ]
    assert longest == [8192]
    assert [
        g.shape.T
        for g in plan_groups(BenchmarkPlan(lengths=(600, 512)), cuda=False)
        if g.what == "alone"
    ] == [512, 600]


@pytest.mark.parametrize("shape", ["1x2x3", "0x1x2x3", "1x2x3xa", "1x2x3x-4", ""])
def test_a_shape_that_is_none_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match="shapes: expected BxHxTxDh, as 1x16x32768x64; got"):
        BenchmarkPlan(shapes=(shape,))


def test_a_group_that_would_not_end_in_time_is_left_out_and_shorter_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a device on which full attention of 8192 tokens takes half an hour."""
    now = [0.0]
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])
    plan = BenchmarkPlan(lengths=(64, 128, 8192), mixes=("10/60/30",), seconds=3600.0)
    timed = Suite(CPU, plan, [])

    def measured(group: Group) -> list[dict[str, object]]:
        timed.clock.once = pace.work(group.what, group.shape) / 4e7
        now[0] += pace.ROUNDS * timed.clock.once
        return [{"what": group.what, "T": group.shape.T}]

    for name in ("causal", "decode", "alone", "training_memory"):
        monkeypatch.setattr(timed, name, measured)
    rows = list(timed.rows())
    assert now[0] <= 3600
    assert {row["T"] for row in rows if row["what"] == "forward"} == {64, 128}
    assert {row["T"] for row in rows if row["what"] == "alone"} == {64, 128, 8192}
    assert "forward 10/60/30, runs of 1: T 8192" in suite._named(timed.left_out)
    assert "training memory: T 8192" in suite._named(timed.left_out)


def test_what_was_not_measured_is_said_beside_what_was() -> None:
    rows = table((8192, 2.0, 2.0), (16384, 3.0, 3.0))
    rows.attrs["missed"] = [("forward", "a", 1, 1, 16, 64, T) for T in (1024, 512, 32768)] + [
        ("decode", "a", 1, 1, 16, 64, 64)
    ]
    assert summary.break_even(rows) == [
        "forward a, runs of 1, B1 H16 Dh64: ahead at all 2 lengths measured (8192, 16384); not "
        "measured, and shorter, where "
        "routing may lose: 512, 1024; not measured: 32768"
    ]


def test_no_time_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="seconds: expected time to hold every backend against the reference first"
    ):
        suite.run_benchmark(CPU, BenchmarkPlan(quick=True, seconds=1e-9))
    monkeypatch.setattr(suite, "verify", lambda device, until: [])
    with pytest.raises(ValueError, match="seconds: expected time to measure something; got 0.001"):
        suite.run_benchmark(CPU, BenchmarkPlan(quick=True, seconds=1e-3))


def test_the_first_comparison_tells_that_all_of_them_take_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(verify.time, "perf_counter", lambda: now[0])

    def slow(case: verify.Case, *_: object) -> list[Backend]:
        now[0] += 10 * case.work
        return []

    monkeypatch.setattr(verify, "_verify", slow)
    monkeypatch.setattr(verify, "_verify_cache", slow)
    with pytest.raises(ValueError, match="against the reference first, 245 s at the pace of this"):
        verify.verify(CPU, until=244.0)
    assert now[0] == 30.0
    now[0] = 0.0
    verify.verify(CPU, until=246.0)


def test_what_there_is_no_time_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])
    timed = Suite(CPU, BenchmarkPlan(lengths=(64,), mixes=("10/60/30",), seconds=10.0), [])

    def measured(group: Group) -> list[dict[str, object]]:
        now[0] += 4.0
        return [{"what": group.what}]

    for name in ("causal", "decode", "alone", "training_memory"):
        monkeypatch.setattr(timed, name, measured)
    assert [row["what"] for row in timed.rows()] == ["forward", "forward+backward"]
    assert [group.what for group in timed.left_out][:3] == ["decode", "forward", "forward+backward"]
    named = suite._named(timed.left_out)
    assert named[0] == "decode 10/60/30, runs of 1: T 64" and named[-2:] == [
        "alone: T 64",
        "training memory: T 64",
    ]
    assert timed.clock.budget == pytest.approx(
        (10 - suite.DRAWING - 4) / (len(timed.groups) - 1) / 2
    )
    with pytest.raises(ValueError, match="seconds: expected a positive number; got 0"):
        BenchmarkPlan(seconds=0.0)


def test_the_ideal_counts_the_state_of_every_token() -> None:
    H, T, Dh, W = 8, 4096, 64, cases.WINDOW
    full = H * 4 * Dh * (T + 1) / 2
    local = H * 4 * Dh * (W * (T - (W - 1) / 2)) / T
    state = 2 * H * Dh * (Dh + 1)
    assert cases.ideal_flops(Shape(1, H, T, Dh), "10/60/30") == pytest.approx(
        full / (0.1 * full + 0.3 * local + 0.6 * state + state)
    )


def test_rows_of_every_kind_have_their_columns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(suite, "verify", lambda device, until: [TORCH])
    monkeypatch.setattr(
        memory, "peak_bytes", lambda kind, T, *_, **__: T * (1 if kind == "full" else 2)
    )
    monkeypatch.setattr(suite, "CPU_BUDGET", 0.0)
    rows = run_benchmark(CPU, BenchmarkPlan(shapes=("1x2x64x16", "1x2x128x16")), tmp_path)
    for what in ("forward", "forward+backward", "decode"):
        found = rows[rows["what"] == what]
        assert set(zip(found["mix"], found["run"], strict=True)) == {
            (mix, run) for mix in cases.MIXES for run in (1, 64)
        }
    alone = rows[(rows["what"] == "alone") & (rows["T"] == 128)]
    assert (alone["memory_growth"] == 2).all() and (alone["time_growth"] > 0).all()
    assert (
        rows.loc[rows["what"] == "training memory", "over_full"].tolist()
        == [1.0, 2.0, 2.0, 2.0] * 2
    )
    assert not rows.attrs["left_out"] and len(pd.read_csv(tmp_path / "speed_cpu.csv")) == len(rows)
    assert not (tmp_path / "speed_cpu.partial.csv").exists()
    draw(rows[rows["what"] == "decode"], tmp_path / "part.png")  # whatever was cut off
    assert (tmp_path / "part.png").stat().st_size > 1000


@pytest.mark.parametrize("mix", ["10/60", "10/60/40", "a/b/c", "-10/60/50"])
def test_a_mix_that_is_none_is_refused(mix: str) -> None:
    with pytest.raises(
        ValueError, match="mixes: expected percentages FULL/LINEAR/LOCAL that add up to 100"
    ):
        BenchmarkPlan(mixes=(mix,))


def test_routes_follow_the_mix() -> None:
    torch.manual_seed(0)
    route = cases.draw_route("10/60/30", 4, 5000, run=50)
    assert (route.view(4, -1, 50) == route.view(4, -1, 50)[:, :, :1]).all()
    share = torch.bincount(route.flatten(), minlength=3) / route.numel()
    torch.testing.assert_close(share, torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=0.1)


def test_a_missing_package_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "seaborn", None)
    with pytest.raises(
        ValueError,
        match="expected the packages pandas and seaborn; got: .* run: pip install seaborn",
    ):
        facts.drawing_packages()


def test_the_time_is_kept_on_a_machine_that_gets_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes longer and longer, in the end eight times; processes hang."""
    now = [0.0]
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> None:
        now[0] += seconds * min(2 ** (now[0] / 10), 8)

    timed = Suite(CPU, BenchmarkPlan(lengths=(512, 2048, 8192), seconds=60.0), [], drawing=5.0)

    def measured(group: Group) -> Iterator[dict[str, object]]:
        seconds = pace.work(group.what, group.shape) / 2e11
        timed.clock(dict.fromkeys(("full", "auto"), lambda: takes(seconds)))
        yield {"what": group.what, "T": group.shape.T}

    def peak_bytes(*_: object, patience: float, **__: object) -> int:
        began = now[0]
        takes(4.0)
        if now[0] - began > patience:
            now[0] = began + patience
            raise TimeoutError
        return 2**20

    for name in ("causal", "decode"):
        monkeypatch.setattr(timed, name, measured)
    monkeypatch.setattr(suite, "routed_attention", lambda *_, **__: takes(0.01))
    monkeypatch.setattr(suite.memory, "peak_bytes", peak_bytes)
    monkeypatch.setattr(suite.memory, "measurable", lambda device: True)
    rows = list(timed.rows())
    assert 20 < now[0] <= 60 - 5.0
    assert {row["T"] for row in rows} >= {512, 2048} and timed.left_out


def test_no_turn_begins_that_would_pass_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])

    def slower() -> None:  # a second to warm up, one in the first turn, two in each later one
        now[0] += 1.0 if now[0] < 2 else 2.0

    timer = Clock(CPU, budget=100.0)
    for end, turns, slowest in ((8.0, 4, 2.0), (7.9, 3, 2.0), (2.0, 1, 1.0)):
        now[0], timer.end, read = 0.0, end, []
        timer({"a": lambda read=read: (read.append(now[0]), slower())})  # type: ignore[misc]
        assert (len(read), timer.once) == (1 + turns, slowest) and now[0] <= end
    now[0], timer.end = 0.0, 1.5
    with pytest.raises(clock.OutOfTime):
        timer({"a": slower})


def test_a_long_text_is_tried_on_a_short_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a time was given; of what is learned there, no row."""
    for seconds, tried in ((60.0, [2048]), (None, [])):
        lengths: list[int] = []
        plan = BenchmarkPlan(lengths=(65536,), mixes=("10/60/30",), seconds=seconds)
        timed = Suite(CPU, plan, [])

        def measured(group: Group, timed=timed, lengths=lengths) -> Iterator[dict[str, object]]:  # type: ignore[no-untyped-def]
            lengths.append(group.shape.T)
            timed.clock.once = pace.work(group.what, group.shape) / 1e9
            yield {"what": group.what, "T": group.shape.T}

        for name in ("causal", "decode", "alone", "training_memory"):
            monkeypatch.setattr(timed, name, measured)
        rows = [row for row in timed.rows() if row["what"] == "forward"]
        assert lengths[: len(tried)] == tried and (not rows) == bool(tried)
    lengths, now = [], [0.0]
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])
    timed = Suite(CPU, replace(plan, seconds=60.0, lengths=(65536, 32768)), [])

    def slow(group: Group) -> Iterator[dict[str, object]]:
        lengths.append(group.shape.T)
        raise clock.OutOfTime
        yield {}

    for name in ("causal", "decode", "alone", "training_memory"):
        monkeypatch.setattr(timed, name, slow)
    assert not list(timed.rows())
    assert lengths == [2048] * 3 + [32768, 65536]  # one of a kind, and expert by expert


@pytest.mark.skipif(not memory.measurable(CPU), reason="this system tells no peak")
def test_a_process_that_takes_too_long_is_ended() -> None:
    began = suite.time.perf_counter()
    with pytest.raises(TimeoutError, match="expected within 0 s"):
        memory.peak_bytes("full", 2**14, 8, 64, 256, training=True, device=CPU, patience=0.2)
    assert suite.time.perf_counter() - began < 60
    assert not any(child.is_alive() for child in multiprocessing.active_children())


@pytest.mark.parametrize("what", ["alone", "training memory", "decode", "forward"])
def test_a_table_of_what_there_was_time_for_is_drawn(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only(group: Group) -> Iterator[dict[str, object]]:
        if group.what != what:
            raise clock.OutOfTime
        row = {"what": what, **vars(group.shape)}
        if what == "training memory":
            yield {**row, "variant": "full", "peak_mib": 3.0, "over_full": 1.0}
        elif what == "alone":
            yield {**row, "variant": "local", "ms": 1.0, "wall_ms": 1.0}
        else:
            both = {"full": Timing(2, 2), "auto": Timing(1, 1)}
            yield from compared(both, {}, **row, mix="10/60/30", run=1, ideal=4.0)

    monkeypatch.setattr(suite, "verify", lambda device, until: [])
    for name in ("causal", "decode", "alone", "training_memory"):
        monkeypatch.setattr(Suite, name, lambda self, group: only(group))
    plan = BenchmarkPlan(lengths=(64,), mixes=("10/60/30",), seconds=60.0)
    found = run_benchmark(CPU, plan, tmp_path)
    assert set(found["what"]) == {what} and (tmp_path / "speed_cpu.png").stat().st_size > 1000
    assert summary.closing(found) and found.attrs["left_out"]


def test_full_and_routed_are_read_beside_a_busy_process(monkeypatch: pytest.MonkeyPatch) -> None:
    running, usual = [], suite.neighbours

    @contextmanager
    def counted(number: int) -> Iterator[None]:
        with usual(number):
            running.append(number)
            yield
            running.pop()

    monkeypatch.setattr(suite, "neighbours", counted)
    timed = suite.Suite(torch.device("cpu"), BenchmarkPlan(quick=True), [])
    seen, clock = [], timed.clock
    monkeypatch.setattr(timed, "clock", lambda calls: seen.append(list(running)) or clock(calls))
    rows = list(timed.beside(Group(BESIDE, Shape(1, 2, 300, 16), "10/60/30")))
    assert seen == [[1]] and not running
    assert {row["variant"] for row in rows} == {"full", "auto"}
    assert {row["what"] for row in rows} == {BESIDE} and all(row["speedup"] > 0 for row in rows)
    found = [g for g in plan_groups(BenchmarkPlan(), cuda=False) if g.what == BESIDE]
    assert [g.shape.T for g in found] == [2048, 8192] and all(g.target for g in found)
    alone = plan_groups(BenchmarkPlan(cpu_time=True), cuda=False)
    assert BESIDE not in {g.what for g in alone + plan_groups(BenchmarkPlan(), cuda=True)}
