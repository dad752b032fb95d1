"""`bayes-router bench`: does hard routing save time and memory on this device?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from jsonargparse import Namespace

from bayes_router.checks import require
from bayes_router.commands.options import Parser
from bayes_router.training.distributed import pick_device

HELP = "measure hard routing against the fastest full attention of this device"
COLUMNS = (
    *("what", "mix", "run", "B", "H", "T", "Dh", "variant", "ms", "wall_ms", "speedup", "wall_speedup", "ideal", "share"),
    *("peak_mib", "over_full", "time_growth", "memory_growth"),
)


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `bench`."""
    result = Parser(
        description="Measure routed attention against the fastest full attention of a device, in turn, planning included: "
        "forward, forward and backward, decoding, memory. Nothing is timed before every backend agrees with the reference."
    )
    result.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda")
    result.add_argument("--quick", action="store_true", help="short texts and one mix only")
    result.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for speed_DEVICE.csv and .png")
    result.add_argument("--lengths", type=int, nargs="+", default=None, help="tokens T (default: 512 to 32768, 65536 on a GPU)")
    result.add_argument("--mixes", type=str, nargs="+", default=None, help="percentages full/linear/local, as 10/60/30")
    result.add_argument(
        "--shapes", type=str, nargs="+", default=None, help="BxHxTxDh, as 1x16x32768x64, instead of the usual ones"
    )
    result.add_argument(
        "--seconds", type=Optional[float], default=None, help="begin nothing after (default: 140 on a GPU, 1800 on a CPU)"
    )
    result.add_argument(
        "--cpu_time", "--cpu-time", action="store_true", help="processor time of one thread, on a machine that is shared"
    )
    return result


def run(options: Namespace) -> None:
    """Verify, measure, write, and print every row, where routing loses, and what was left out."""
    from bayes_router.benchmark import suite, summary  # with pandas and seaborn, only where they are wanted

    device = pick_device(options.device)
    require(
        not (options.cpu_time and device.type != "cpu"), "cpu_time", "a CPU", str(device), "leave it out, or give --device cpu"
    )
    require(not options.out.is_file(), "out", "a folder", str(options.out), "choose another path")
    lengths, mixes, shapes = (
        None if x is None else tuple(dict.fromkeys(x)) for x in (options.lengths, options.mixes, options.shapes)
    )
    plan = suite.Plan(options.quick, lengths, mixes, options.cpu_time, shapes, options.seconds)
    table = suite.run_benchmark(device, plan, options.out, progress)
    print()
    shown = table[[c for c in COLUMNS if c in table]]
    print(shown.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    print("", *summary.closing(table), sep="\n")
    print(
        f"\n{table['device'].iloc[0]}; {table['versions'].iloc[0]}; written to {options.out}/speed_{device.type}.csv and .png"
    )


def progress(row: dict[str, Any]) -> None:
    """A line a measurement as it comes, for who waits."""
    parts = [f"{key} {row[key]:.3g}" for key in ("ms", "wall_ms", "speedup", "peak_mib") if row.get(key) is not None]
    where = f"{row['what']} {row.get('mix', '')} B{row['B']} H{row['H']} T{row['T']} Dh{row['Dh']}"
    runs = f", runs of {row['run']}" if row.get("run", 1) > 1 else ""
    print(f"{where}{runs}, {row['variant']}: {', '.join(parts)}", flush=True)
