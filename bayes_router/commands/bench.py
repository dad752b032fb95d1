"""`bayes-router bench`: does hard routing save time and memory on this device?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from bayes_router.commands.options import Parser
from bayes_router.config import require
from bayes_router.training.distributed import pick_device

HELP = "measure hard routing against the fastest full attention of this device"
COLUMNS = ("what", "mix", "run", "B", "H", "T", "Dh", "variant", "ms", "wall_ms", "speedup", "wall_speedup", "ideal", "share")


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
        "--cpu_time", "--cpu-time", action="store_true", help="processor time of one thread, on a machine that is shared"
    )
    return result


def run(options: Namespace) -> None:
    """Verify, measure, write, and print every row and where routing loses."""
    from bayes_router.benchmark import suite  # with pandas and seaborn, only where they are wanted

    device = pick_device(options.device)
    require(
        not (options.cpu_time and device.type != "cpu"), "cpu_time", "a CPU", str(device), "leave it out, or give --device cpu"
    )
    require(not options.out.is_file(), "out", "a folder", str(options.out), "choose another path")
    lengths, mixes = (None if x is None else tuple(dict.fromkeys(x)) for x in (options.lengths, options.mixes))
    plan = suite.Plan(options.quick, lengths, mixes, options.cpu_time)
    table = suite.run_benchmark(device, plan, options.out, progress)
    print()
    shown = table[[c for c in (*COLUMNS, "peak_mib") if c in table]]
    print(shown.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    print("", *suite.break_even(table), sep="\n")
    print(
        f"\n{table['device'].iloc[0]}; {table['versions'].iloc[0]}; written to {options.out}/speed_{device.type}.csv and .png"
    )


def progress(row: dict[str, Any]) -> None:
    """A line a measurement as it comes, for who waits."""
    parts = [f"{key} {row[key]:.3g}" for key in ("ms", "wall_ms", "speedup", "peak_mib") if row.get(key) is not None]
    print(f"{row['what']} {row.get('mix', '')} T {row['T']} {row['variant']}: {', '.join(parts)}", flush=True)
