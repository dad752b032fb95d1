"""`bayes-router bench`: does hard routing save time and memory on this device?"""

from typing import Any

from jsonargparse import Namespace

from bayes_router.checks import require
from bayes_router.progress import Progress
from bayes_router.training.distributed import pick_device

COLUMNS = (
    *(
        "what",
        "mix",
        "run",
        "B",
        "H",
        "T",
        "Dh",
        "variant",
        "ms",
        "wall_ms",
        "speedup",
        "wall_speedup",
        "ideal",
        "share",
    ),
    *("peak_mib", "over_full", "time_growth", "memory_growth"),
)


def run(options: Namespace) -> None:
    """Verify, measure, write, and print every row, where routing loses, and what was left out."""
    # with pandas and seaborn, only where they are wanted
    from bayes_router.benchmark import suite, summary
    from bayes_router.benchmark.plan import BenchmarkPlan

    device = pick_device(options.device)
    require(
        not (options.cpu_time and device.type != "cpu"),
        "cpu_time",
        "a CPU",
        str(device),
        "leave it out, or give --device cpu",
    )
    lengths, mixes, shapes = (
        None if x is None else tuple(dict.fromkeys(x))
        for x in (options.lengths, options.mixes, options.shapes)
    )
    asked = BenchmarkPlan(
        options.quick, lengths, mixes, options.cpu_time, shapes, options.seconds, options.part
    )
    with Progress("bench", unit="group") as progress:
        table = suite.run_benchmark(
            device,
            asked,
            options.out,
            lambda row: progress.above(measured(row)),
            options.began,
            progress,
        )
    print()
    shown = table[[c for c in COLUMNS if c in table]]
    print(shown.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    print("", *summary.closing(table), sep="\n")
    print(
        f"\n{table['device'].iloc[0]}; {table['versions'].iloc[0]}; written to "
        f"{options.out}/speed_{device.type}.csv and .png"
    )


def measured(row: dict[str, Any]) -> str:
    """A line a measurement as it comes, for who waits."""
    parts = [
        f"{key} {row[key]:.3g}"
        for key in ("ms", "wall_ms", "speedup", "peak_mib")
        if row.get(key) is not None
    ]
    where = f"{row['what']} {row.get('mix', '')} B{row['B']} H{row['H']} T{row['T']} Dh{row['Dh']}"
    runs = f", runs of {row['run']}" if row.get("run", 1) > 1 else ""
    return f"{where}{runs}, {row['variant']}: {', '.join(parts)}"
